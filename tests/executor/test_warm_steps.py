"""What an executor runs before the first real step."""

from __future__ import annotations

import pytest

from tokenspeed.batch import BatchLimits
from tokenspeed.executor.warm_steps import sizes, warm_steps

LIMITS = [
    BatchLimits(max_rows=rows, max_tokens=tokens, max_blocks=blocks, block_size=16)
    for rows in (1, 2, 8)
    for tokens in (1, 7, 48, 512, 8192)
    for blocks in (1, 20, 1000, 8000)
]


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_every_warm_step_is_one_that_a_plan_may_ask_for(limits: BatchLimits) -> None:
    for step in warm_steps(limits):
        assert 0 < len(step.query_lens) <= limits.max_rows
        assert 0 < sum(step.query_lens) <= limits.max_tokens
        assert min(step.query_lens) > 0 and step.context >= 0
        assert max(step.kv_lens) <= max(1, (limits.max_blocks - 1) * limits.block_size)
        assert step.query_lens[: step.num_decode] == (1,) * step.num_decode


def test_the_largest_step_comes_first_then_the_longest_context() -> None:
    first, second, third, *others = warm_steps(BatchLimits(max_rows=4, max_tokens=8192, max_blocks=2000, block_size=64))
    assert (first.query_lens, first.context) == ((8192,), 0)
    assert second.query_lens == (8192,) and second.context == 7 * 8192 + 64
    assert (third.query_lens, third.context) == ((8192,), 0)
    lone = [step for step in others if step.context]
    assert all(step.num_decode == 1 and step.context == second.context for step in lone)
    assert [step.query_lens[-1] for step in lone] == sizes(8192)[1:]


def test_every_size_comes_also_alone_and_short_rows_in_powers_of_two() -> None:
    limits = BatchLimits(max_rows=100, max_tokens=8192, max_blocks=2000, block_size=64)
    alone = [step.query_lens for step in warm_steps(limits) if not step.context]
    assert alone[1:-7] == [(size,) for size in sizes(8192)]
    assert [(len(rows), set(rows)) for rows in alone[-7:]] == [
        (100, {81}), (64, {128}), (32, {128}), (16, {128}), (8, {128}), (4, {128}), (2, {128})
    ]  # fmt: skip


def test_sizes_are_eighths_and_below_them_powers_of_two() -> None:
    assert sizes(8192)[:11] == [8192, 7168, 6144, 5120, 4096, 3072, 2048, 1536, 1024, 768, 512]
    assert sizes(8192)[11:] == [384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1]
    assert sizes(3) == [3, 2, 1]
