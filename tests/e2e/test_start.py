"""A start that cannot work ends within seconds, non-zero, with one line that names the file or the flag."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.toy import toy_llama

SECONDS = 25.0
"""What is promised is 10 on a machine of its own; tests may share theirs, and that may be slow."""


def start(*flags: str, **environment: str) -> tuple[int, str, float]:
    """Run the server with these flags to its end: exit status, output, seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tokenspeed.entrypoints.api", *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    toy_llama(folder / "toy")
    return folder / "toy"


def truncated_weights(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return "model.safetensors"


def unknown_architecture(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["SteamEngineForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    return "SteamEngineForCausalLM"


def zero_heads(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    config["num_attention_heads"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    return "num_attention_heads"


def broken_tokenizer(folder: Path) -> str:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:500])
    return "tokenizer.json"


def pickled_weights(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin"


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


DAMAGE: list[Callable[[Path], str]] = [
    truncated_weights,
    unknown_architecture,
    zero_heads,
    broken_tokenizer,
    pickled_weights,
    no_config,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_broken_checkpoint_is_named(good: Path, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(good, folder)
    named = damage(folder)
    status, output, seconds = start("--model", str(folder), "--port", "0")
    assert status != 0 and seconds < SECONDS
    assert named in output and "Traceback" not in output
    assert len(one_line(output)) == 1, output


def one_line(output: str) -> list[str]:
    """The lines that complain, beside the log's."""
    return [line for line in output.splitlines() if line.startswith("tokenspeed: ")]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "/nowhere/at-all"], "/nowhere/at-all"),
        (["--block-size", "63"], "--block-size"),
        (["--max-num-seqs", "0"], "--max-num-seqs"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--trust-remote-code"], "--trust-remote-code"),
        (["--host", "0.0.0.0"], "--api-key"),
        (["--kv-cache-memory", "4096GiB"], "--kv-cache-memory"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_a_wrong_flag_is_named(flags: list[str], named: str) -> None:
    status, output, seconds = start("--port", "0", *flags)
    assert status != 0 and seconds < SECONDS
    assert named in output and "Traceback" not in output


@pytest.mark.parametrize(
    ("forced", "reason"),
    [
        ("mha_decode=abacus", "has no backend 'abacus'"),
        ("mla_decode=hopper,mha_decode=triton", "mha_decode=triton cannot run mha_decode on cpu"),
        ("steam=reference", "unknown op 'steam'"),
        ("nonsense", "not of the form op=backend"),
    ],
)
def test_a_kernel_choice_that_cannot_be_honoured_is_named(good: Path, forced: str, reason: str) -> None:
    status, output, seconds = start("--model", str(good), "--port", "0", TOKENSPEED_KERNELS=forced)
    assert status != 0 and seconds < SECONDS
    assert reason in output and "Traceback" not in output
    assert len(one_line(output)) == 1, output


def test_a_truncated_gguf_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\xff" * 100)
    status, output, seconds = start("--model", str(path), "--port", "0")
    assert status != 0 and seconds < SECONDS
    assert "cut.gguf" in output and "Traceback" not in output


def test_a_taken_port_is_named(good: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        status, output, seconds = start("--model", str(good), "--port", str(port))
    assert status != 0 and seconds < SECONDS
    assert str(port) in output and "Traceback" not in output
