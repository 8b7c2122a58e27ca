"""The ranks of an all-reduce through shared memory: processes that run the kernel in Triton's interpreter, one call
after the other, at their own pace."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from tokenspeed.kernels.peers import Peers

ROOT = Path(__file__).parents[2]
RANKS, ROWS, HIDDEN = 3, 6, 32
CALLS = ((2, False), (6, True), (1, False), (4, True), (4, True), (6, False), (1, True), (2, False), (5, False))
"""Tokens of each call, and whether each token has an owner that sums it."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_ranks_at_their_own_pace_get_every_sum_and_the_same_bits() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_all_reduce_norm"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def given(call: int, rank: int) -> torch.Tensor:
    return torch.randn(CALLS[call][0], HIDDEN, generator=torch.Generator().manual_seed(100 * call + rank))


def run(rank: int, peers: Peers, results: torch.Tensor) -> None:
    """All calls of one rank; `results` [calls, 2, ROWS, HIDDEN] gets what they give."""
    torch.set_num_threads(1)
    # Not before the process has asked for the interpreter.
    from tokenspeed.kernels.triton.all_reduce_norm import _launched  # noqa: PLC0415

    pace, gain = random.Random(rank), torch.ones(HIDDEN)
    for call, (tokens, two_shots) in enumerate(CALLS):
        time.sleep(pace.choice((0.0, 0.0, 0.1)))
        residual = given(call, RANKS)
        for at, tensor in enumerate(_launched(given(call, rank), gain, 1e-5, residual, peers, two_shots)):
            results[call, at, :tokens] = tensor


def main() -> None:
    """Start the ranks, and compare what all of them got with sums written out."""

    def shared(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype).share_memory_()

    terms, sums = ([shared(2, ROWS, HIDDEN) for _ in range(RANKS)] for _ in range(2))
    arrived = [shared(ROWS, RANKS, dtype=torch.int32) for _ in range(RANKS)]
    summed = [shared(ROWS, dtype=torch.int32) for _ in range(RANKS)]
    results = shared(RANKS, len(CALLS), 2, ROWS, HIDDEN)
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(RANKS):
        calls = torch.zeros(2, ROWS, dtype=torch.int32)
        peers = Peers(rank, tuple(terms), tuple(sums), tuple(arrived), tuple(summed), calls)
        processes.append(context.Process(target=run, args=(rank, peers, results[rank])))
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    for call, (tokens, _) in enumerate(CALLS):
        want = sum((given(call, rank) for rank in range(RANKS)), given(call, RANKS))
        for rank in range(RANKS):
            y, r = results[rank, call, :, :tokens]
            torch.testing.assert_close(r, want, rtol=1e-5, atol=1e-5, msg=f"call {call}, rank {rank}")
            torch.testing.assert_close(y, want * torch.rsqrt(want.square().mean(1, keepdim=True) + 1e-5))
            assert torch.equal(r, results[0, call, 1, :tokens]), f"call {call}: rank {rank} has other bits than rank 0"


if __name__ == "__main__":
    main()
