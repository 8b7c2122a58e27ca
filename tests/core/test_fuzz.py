"""The compiled scheduler, its oracle and the shadow device agree after every one of many random calls."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.core import fuzz
from tokenspeed.batch import BatchLimits

SEEDS = 60
CALLS = 700

# Every way in which a request can end, and every state in which it can be told to.
REACHED = (
    "ended by STOP", "ended by LENGTH", "ended by ERROR",
    "abort waiting", "abort running", "abort retracting", "abort draining", "abort unknown",
    "finish waiting", "finish running", "finish retracting", "finish draining", "finish unknown",
    "QUEUE_FULL", "TOO_LONG", "TOO_LONG_FOR_CACHE", "EMPTY", "DUPLICATE_ID", "BAD_TOKEN",
    "preemptions", "hit blocks", "nothing to plan", "misuse",
)  # fmt: skip


def test_random_calls_agree_with_the_oracle_and_every_row_reads_its_own_tokens() -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        seen += fuzz.run(seed, CALLS).seen
    assert [name for name in REACHED if seen[name] == 0] == []
    assert seen["positions read"] > 100_000


@pytest.mark.parametrize("overlap", [0, 1])
def test_starved_requests_all_end(overlap: int) -> None:
    """Six requests that together want four times the pool: they preempt each other and all reach their length."""
    world = fuzz.World(
        num_blocks=8,
        limits=BatchLimits(max_rows=6, max_tokens=12, max_blocks=8, block_size=2),
        max_model_len=14,
        max_queued=12,
        prefix_caching=True,
        overlap=overlap,
        not_finite=0.0,
        ends=0.0,
        hungry=True,
    )
    run = fuzz.Fuzz(seed=overlap, world=world)
    for _ in range(24):
        run.submit()
        run.compare()
    assert run.seen["submitted"] >= 6
    run.drain()
    assert run.core.stats().preemptions > 0
    assert run.seen["ended by LENGTH"] == run.seen["submitted"]
