"""From a folder on disk to an executor that gives the tokens of `transformers`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from tests.toy import VOCAB_SIZE, greedy, toy_llama
from tokenspeed.batch import ON_DEVICE, BatchLimits, Plan
from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.config import EngineConfig
from tokenspeed.entrypoints.flags import FLAGS
from tokenspeed.errors import CheckpointError, ConfigError
from tokenspeed.executor import load
from tokenspeed.executor.interface import Binding
from tokenspeed.executor.load import LoadedExecutor, load_executor
from tokenspeed.request import SamplingParams


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a GPU: what happens there is tested in test_on_gpu.py."""
    monkeypatch.setenv(load.DEVICE, "cpu")


def config_of(folder: Path, **changes: object) -> EngineConfig:
    settings: dict[str, object] = {"model": str(folder), "dtype": "float32", "block_size": 16, "num_threads": 1}
    return EngineConfig(**(settings | changes))  # type: ignore[arg-type]


async def generate(loaded: LoadedExecutor, prompt: list[int], count: int) -> list[int]:
    """One request in slot 2, its blocks handed out backwards."""
    executor = loaded.executor
    params = SamplingParams(temperature=0.0)
    binding = Binding(params, np.array(prompt, dtype=np.int32), len(prompt), 0, np.zeros(0, dtype=np.int32))
    tokens = []
    for step in range(count):
        buffers = executor.new_buffers()
        ids = prompt if step == 0 else [ON_DEVICE]
        computed = 0 if step == 0 else len(prompt) + step - 1
        buffers.row_slot[0], buffers.row_new[0], buffers.row_computed[0] = 2, len(ids), computed
        buffers.token_ids[: len(ids)] = ids
        first, last = -(-computed // 16), -(-(computed + len(ids)) // 16)
        for index, position in enumerate(range(first, last)):
            buffers.table_delta[index] = 2, position, executor.num_blocks - 1 - position
        buffers.bound[0] = 2, 0
        plan = Plan(
            step, buffers, 1, int(len(ids) == 1), len(ids), last - first, 1, int(step == 0), 0, 0,
            allowed_prompt_tokens=0,
        )  # fmt: skip
        result = await executor.launch(plan, [binding]).tokens()
        tokens.append(int(result.tokens[0, 0]))
    return tokens


def test_a_loaded_executor_computes_what_transformers_computes(tmp_path: Path) -> None:
    reference = toy_llama(tmp_path)
    seen: list[tuple[str, int, int]] = []
    loaded = load_executor(config_of(tmp_path), lambda stage, done, total: seen.append((stage, done, total)))
    prompt = [7, 301, 4, 88, 12] * 7
    assert asyncio.run(generate(loaded, prompt, 20)) == greedy(reference, prompt, 20)
    loaded.executor.close()
    assert loaded.max_model_len == 1024
    assert loaded.eos_token_ids == (2,)
    assert loaded.limits.max_blocks == 64
    assert loaded.executor.num_blocks == 64 * 64
    assert "context 1024" in loaded.summary
    assert all(stage == "weights" for stage, _, _ in seen)
    assert seen[-1][1] == seen[-1][2] == sum(p.numel() for p in reference.parameters()) * 4


def test_the_flags_decide_length_and_cache(tmp_path: Path) -> None:
    toy_llama(tmp_path)
    per_block = 3 * 2 * 2 * 16 * 16 * 4
    loaded = load_executor(config_of(tmp_path, max_model_len=100, kv_cache_bytes=5 * per_block + 1))
    loaded.executor.close()
    assert loaded.max_model_len == 100
    assert loaded.limits.max_blocks == 7
    assert loaded.executor.num_blocks == 5


def test_what_cannot_be_is_refused_in_one_line_that_names_it(tmp_path: Path) -> None:
    toy_llama(tmp_path)
    faults = (
        ({"max_model_len": 1025}, ConfigError, r"--max-model-len 1025 .*1024.*config\.json"),
        ({"kv_cache_bytes": 1 << 50}, ConfigError, "--kv-cache-memory asks for"),
        ({"kv_cache_bytes": 1000}, ConfigError, "--kv-cache-memory.*less than one block"),
        ({"model": str(tmp_path / "absent")}, CheckpointError, "absent"),
    )
    for changes, kind, message in faults:
        with pytest.raises(kind, match=message) as caught:
            load_executor(config_of(tmp_path, **changes))
        assert "\n" not in str(caught.value)


def test_weights_beyond_the_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_llama(tmp_path)
    monkeypatch.setattr(load, "available_memory", lambda: 100_000)
    with pytest.raises(ConfigError, match=r"the weights take [\d,.]+ MiB, but only 0\.1 MiB .* are available.*--dtype"):
        load_executor(config_of(tmp_path))


def test_sizes_that_no_machine_has_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    toy_llama(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_attention_heads": 6', '"num_attention_heads": 16384'))
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 4194304'))
    config.write_text(config.read_text().replace('"hidden_size": 96', '"hidden_size": 1048576'))
    with pytest.raises(ConfigError, match=r"the weights take [\d,]+\.\d MiB"):
        load_executor(config_of(tmp_path))


def test_bfloat16_gives_tokens_of_the_vocabulary(tmp_path: Path) -> None:
    toy_llama(tmp_path)
    loaded = load_executor(config_of(tmp_path, dtype="bfloat16"))
    tokens = asyncio.run(generate(loaded, [1, 2, 3], 4))
    loaded.executor.close()
    assert all(0 <= token < VOCAB_SIZE for token in tokens)


class Heard:
    """What a rank says that has to be the same on all."""

    def __init__(self, config: EngineConfig) -> None:
        self.said: list[tuple[str, str]] = []
        model = ModelConfig(
            file="config.json", architecture="LlamaForCausalLM", hf={"hidden_size": 96}, vocab_size=9,
            max_position_embeddings=128, dtype="float32", eos_token_ids=(2,), bos_token_id=0, generation_defaults={},
        )  # fmt: skip
        load.agree(self, config, model, BatchLimits(4, 16, 8, 16), torch.float32)  # type: ignore[arg-type]

    def same(self, name: str, value: str) -> None:
        self.said.append((name, value))


def test_ranks_agree_on_everything_that_they_were_told_but_what_is_their_own() -> None:
    told = EngineConfig()
    others: dict[str, object] = {
        "dtype": "bfloat16", "load_format": "dummy", "max_model_len": 9, "block_size": 128, "max_num_seqs": 9,
        "max_num_batched_tokens": 99, "max_queued_requests": 9, "max_queue_seconds": 9.0, "tps_floor": 9.0,
        "session_admission": False, "enable_prefix_caching": False, "kv_cache_bytes": 9, "overlap": 0, "seed": 9,
        "watchdog_seconds": 9.0, "quantization": "int8",
    }  # fmt: skip
    assert set(others) | load.OWN == set(EngineConfig.__struct_fields__)
    flags = {flag.field: flag.name for flag in FLAGS}
    before = Heard(told).said
    for name, value in others.items():
        after = Heard(structs.replace(told, **{name: value})).said
        assert [flag for flag, _ in after] == [flag for flag, _ in before]
        differ = {flag for (flag, one), (_, other) in zip(before, after, strict=True) if one != other}
        assert differ == {flags[name]}
    assert Heard(structs.replace(told, watchdog_seconds=60)).said == before, "60 and 60.0 are one"
