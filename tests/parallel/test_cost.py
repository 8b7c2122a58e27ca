"""What a prediction is made of, worked out by hand."""

from __future__ import annotations

import pytest

from tests.parallel.parts import decoder, mlp
from tokenspeed.parallel.compiler import compile_model
from tokenspeed.parallel.cost import Hardware, Link, Work
from tokenspeed.parallel.mesh import Mesh

# Of 2 TB/s that a stream gets, kernels get 1 TB/s, and start in 10 µs a block.
MACHINE = Hardware(
    near=Link(20e-6, 1e11),
    shared=Link(5e-6, 2e11),
    stream_bandwidth=2e12,
    read_share=0.5,
    block=10e-6,
    flop_rate=1e14,
    kernel=1e-6,
)


def test_a_block_starts_and_then_reads_or_computes_whichever_takes_longer() -> None:
    reading = Work(weight_bytes=3e6, flop=1e6, kv_bytes=100.0)
    # 3 MB of weights and 100 bytes for each of 2 × 1,001 tokens at 1 TB/s.
    assert MACHINE.work_seconds(reading, 2, 2, 1000) == pytest.approx(10e-6 + 3.2002e-6)
    computing = Work(weight_bytes=3e6, flop=1e9, decode_pair_flop=1e3)
    # 1 GFLOP, and 1 kFLOP for each of 2 tokens with the 1,001 that it sees, at 100 TFLOP/s.
    assert MACHINE.work_seconds(computing, 2, 2, 1000) == pytest.approx(10e-6 + 10.02002e-6)


def test_a_step_over_two_ranks_is_its_blocks_its_norms_and_its_transfers() -> None:
    tokens, row = 8, 8192
    step = {
        copies: compile_model(
            decoder(mlp()), Mesh.of(2, attn_copies=copies), "toy", tokens=tokens, hardware=MACHINE, captured=True
        ).timing(1000)
        for copies in (1, 2)
    }
    # The toy's embedding, attention, dense layer and head each read 1 MB.
    assert step[1].modules == step[2].modules == pytest.approx(4 * (10e-6 + 1e-6))
    # In an all-reduce of n bytes each of two ranks sends n; behind it the norm reads the residual and writes it.
    summed = 5e-6 + tokens * row / 2e11 + 2 * tokens * row / 1e12
    logits = 20e-6 + tokens * 32_768 * 4 / 2 / 1e11
    assert step[1].norms == 0 and step[1].transfers == pytest.approx(3 * summed + logits)
    # Copies of attention give whole tokens: a kernel that norms by itself takes the place of a sum.
    alone = 1e-6 + 4 * tokens * row / 1e12
    assert step[2].norms == pytest.approx(alone) and step[2].transfers == pytest.approx(2 * summed + logits)


def test_a_rank_by_itself_norms_with_a_kernel_of_its_own_and_sends_nothing() -> None:
    program = compile_model(decoder(mlp()), Mesh.of(2), "toy", tokens=8, hardware=MACHINE, captured=True)
    alone = program.timing_alone(1000)
    assert alone.modules == program.timing(1000).modules and alone.transfers == 0
    # Three sums with a norm behind, of 8 rows of 8,192 bytes each.
    assert alone.norms == pytest.approx(3 * (1e-6 + 4 * 8 * 8192 / 1e12))
