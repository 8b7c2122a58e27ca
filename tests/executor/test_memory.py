"""Sizing the KV cache from numbers, and reading the numbers from the machine and its cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tokenspeed.batch import BatchLimits
from tokenspeed.errors import ConfigError
from tokenspeed.executor.machine import available_cpus, available_memory
from tokenspeed.executor.memory import DEFAULT_SHARE, block_bytes, num_kv_blocks
from tokenspeed.layers.forward import KVSpec

LIMITS = BatchLimits(max_rows=4, max_tokens=64, max_blocks=10, block_size=16)
MIB = 1 << 20


def test_a_block_has_the_bytes_of_all_its_layers() -> None:
    spec = [KVSpec((("k", (3, 64)), ("v", (3, 64)))), KVSpec((("latent", (576,)),))]
    assert block_bytes(spec, 16, torch.float32) == (2 * 3 * 64 + 576) * 16 * 4
    assert block_bytes(spec, 64, torch.bfloat16) == (2 * 3 * 64 + 576) * 64 * 2


def test_by_default_every_slot_gets_its_full_length_if_a_share_of_memory_holds_it() -> None:
    assert num_kv_blocks(MIB, LIMITS, kv_cache_bytes=None, available=1000 * MIB) == 40
    assert num_kv_blocks(MIB, LIMITS, kv_cache_bytes=None, available=50 * MIB) == int(50 * DEFAULT_SHARE)
    with pytest.raises(ConfigError, match=r"2\.0 MiB are available.*one block.*1\.0 MiB.*--kv-cache-memory"):
        num_kv_blocks(MIB, LIMITS, kv_cache_bytes=None, available=2 * MIB)


def test_sessions_between_their_turns_get_room_besides_where_memory_holds_it() -> None:
    def blocks(available: int) -> int:
        return num_kv_blocks(MIB, LIMITS, kv_cache_bytes=None, available=available * MIB, sessions_a_row=3)

    assert blocks(1000) == 3 * 40
    assert blocks(200) == int(200 * DEFAULT_SHARE)


def test_asked_for_bytes_are_honoured_or_refused_with_the_numbers() -> None:
    assert num_kv_blocks(MIB, LIMITS, kv_cache_bytes=100 * MIB + 5, available=100 * MIB + 5) == 100
    with pytest.raises(ConfigError, match=r"--kv-cache-memory asks for 101\.0 MiB, but only 100\.0 MiB") as caught:
        num_kv_blocks(MIB, LIMITS, kv_cache_bytes=101 * MIB, available=100 * MIB)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"--kv-cache-memory 0\.5 MiB is less than one block of 16 tokens"):
        num_kv_blocks(MIB, LIMITS, kv_cache_bytes=MIB // 2, available=100 * MIB)


def machine(root: Path, cgroup: str, files: dict[str, str], mem_available_kib: int = 8_000_000) -> Path:
    """A file tree like a Linux machine's."""
    contents = {
        "proc/meminfo": f"MemTotal: 9000000 kB\nMemAvailable: {mem_available_kib} kB\nHugePages_Total: 0\n",
        "proc/self/cgroup": cgroup,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_limits_memory_is_what_the_system_says(tmp_path: Path) -> None:
    files = {"memory.max": "max\n", "memory.current": "5\n"}
    assert available_memory(machine(tmp_path, "0::/\n", files)) == 8_000_000 * 1024


def test_the_tightest_cgroup_on_the_path_counts_and_idle_page_cache_is_free(tmp_path: Path) -> None:
    files = {
        "a/memory.max": f"{900 * MIB}\n",
        "a/memory.current": f"{500 * MIB}\n",
        "a/memory.stat": f"anon 1\ninactive_file {100 * MIB}\nactive_file 7\n",
        "a/b/memory.max": f"{800 * MIB}\n",
        "a/b/memory.current": f"{100 * MIB}\n",
        "a/b/memory.stat": "inactive_file 0\n",
    }
    assert available_memory(machine(tmp_path, "0::/a/b\n", files)) == 500 * MIB


def test_version_1_limits_count_and_its_way_to_say_unlimited_does_not(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "100\n",
        "memory/pod/memory.limit_in_bytes": f"{300 * MIB}\n",
        "memory/pod/memory.usage_in_bytes": f"{400 * MIB}\n",
        "memory/pod/memory.stat": f"cache 3\ntotal_inactive_file {150 * MIB}\n",
    }
    assert available_memory(machine(tmp_path, "4:memory:/pod\n1:cpu:/\n0::/\n", files)) == 50 * MIB


def test_a_container_that_sees_an_outside_path_reads_the_top_of_its_mount(tmp_path: Path) -> None:
    files = {"memory.max": f"{64 * MIB}\n", "memory.current": f"{70 * MIB}\n"}
    assert available_memory(machine(tmp_path, "0::/docker/not/here\n", files)) == 0


def test_processors_are_cut_by_the_quota_of_either_version(tmp_path: Path) -> None:
    affinity = len(os.sched_getaffinity(0))
    assert available_cpus(machine(tmp_path / "none", "0::/\n", {"cpu.max": "max 100000\n"})) == affinity
    assert available_cpus(machine(tmp_path / "v2", "0::/x\n", {"x/cpu.max": "50000 100000\n"})) == 1
    unlimited = {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}
    assert available_cpus(machine(tmp_path / "v1", "2:cpu,cpuacct:/\n", unlimited)) == affinity
    halved = {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "100000\n"}
    assert available_cpus(machine(tmp_path / "cut", "2:cpu:/\n", halved)) == 1
    assert available_cpus() >= 1
    assert available_memory() > MIB
