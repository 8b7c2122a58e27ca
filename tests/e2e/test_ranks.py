"""Two ranks that a launcher has started: the same command in both, the first serves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from tests.e2e.server import Server, free_port
from tests.toy import greedy, toy_llama

PROMPT = [5, 9, 300, 41]


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSPEED_DEVICE", "cpu")


def generate(url: str, num_tokens: int) -> list[int]:
    greedily = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": greedily}
    request = urllib.request.Request(
        f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        ids: list[int] = json.load(response)["output_ids"]
        return ids


def test_the_first_of_two_launched_ranks_serves_and_the_other_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = toy_llama(tmp_path / "model")
    flags = ("--model", str(tmp_path / "model"), "--dtype", "float32", "--num-threads", "1", "--block-size", "16")
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tokenspeed.entrypoints.api", *flags]
    with (tmp_path / "rank1").open("w") as out:
        other = subprocess.Popen(
            command, env=os.environ | launched | {"RANK": "1"}, stdout=out, stderr=subprocess.STDOUT
        )
    for name, value in (launched | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    server = Server(tmp_path / "rank0", *flags)
    try:
        server.wait_ready(120)
        assert generate(server.url, 20) == greedy(reference, PROMPT, 20)
        assert server.stop() == 0
        assert other.wait(30) == 0, (tmp_path / "rank1").read_text()
        assert "rank 1 INFO" in (tmp_path / "rank1").read_text()
    finally:
        server.stop(signal.SIGKILL)
        other.kill()
        other.wait()


def test_ranks_that_were_started_otherwise_say_in_a_line_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_llama(tmp_path / "model")
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "tokenspeed.entrypoints.api", "--model", str(tmp_path / "model"), "--port", "0"]
    ranks = [
        subprocess.Popen(
            [*command, "--block-size", size], env=os.environ | launched | {"RANK": str(rank)}, stderr=subprocess.PIPE
        )
        for rank, size in enumerate(("16", "32"))
    ]
    said = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    for text in said:
        lines = [line for line in text.splitlines() if "--block-size" in line]
        assert len(lines) == 1 and "rank 0 has 16, rank 1 has 32" in lines[0], said
