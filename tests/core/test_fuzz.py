"""The compiled scheduler, its oracle and the shadow device agree after every one of many random calls."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.core import fuzz
from tests.core.world import World
from tokenspeed._core import Policy
from tokenspeed._core.replay import replay
from tokenspeed.batch import BatchLimits

SEEDS = 80
CALLS = 700

# Every way in which a request can end, every state in which it can be told to, every refusal, and what the second
# tier and the sessions can do.
REACHED = (
    "ended by STOP", "ended by LENGTH", "ended by ERROR",
    *(f"{end} {state}" for end in ("abort", "finish")
      for state in ("waiting", "fetching", "prefilling", "decoding", "retracting", "draining", "unknown")),
    "QUEUE_FULL", "TOO_LONG", "TOO_LONG_FOR_CACHE", "EMPTY", "DUPLICATE_ID", "BAD_TOKEN", "FLOOR", "NO_ROOM",
    "preemptions", "hit blocks", "paced", "nothing to plan", "misuse",
    "offloaded", "fetched", "copies landed", "copies failed", "landed for nobody", "prefix blocks lost",
    "copies without a row", "sessions waited", "sessions displaced", "sessions passed", "overdue", "lessons",
    "FLOOR_OUT_OF_REACH",
    "blocks STORED", "blocks REMOVED", "blocks CLEARED",
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
    world = World(
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


@pytest.mark.parametrize("overlap", [0, 1])
def test_starved_requests_with_a_second_tier_all_end(overlap: int) -> None:
    """As before, and what they lose goes to the host and comes back, some copies failing."""
    world = World(
        num_blocks=8,
        limits=BatchLimits(max_rows=6, max_tokens=12, max_blocks=8, block_size=2, max_copies=3),
        max_model_len=14,
        max_queued=12,
        prefix_caching=True,
        overlap=overlap,
        not_finite=0.0,
        ends=0.0,
        hungry=True,
        num_host_blocks=24,
        policy=Policy(footprints=False),
    )
    run = fuzz.Fuzz(seed=overlap, world=world)
    for _ in range(30):
        run.submit()
        run.advance()
        run.land_copies()
        run.compare()
    run.drain()
    assert run.core.stats().preemptions > 0 and run.seen["fetched"] > 0
    assert run.seen["ended by LENGTH"] == run.seen["submitted"]


def test_a_run_that_fails_leaves_its_calls_for_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fuzz.TRACE_FOLDER, str(tmp_path))
    fuzz.run(seed=1, ops=50)
    assert list(tmp_path.iterdir()) == [], "a run that succeeds leaves nothing"

    def disagree(run: fuzz.Fuzz, request_id: int) -> None:
        if run.planned >= 20:
            raise AssertionError(f"request {request_id} was made to fail")

    monkeypatch.setattr(fuzz.Fuzz, "compare_request", disagree)
    with pytest.raises(AssertionError, match=r"seed 1, call .* was made to fail") as failure:
        fuzz.run(seed=1, ops=500)
    named = re.search(r"recorded in (\S+)$", str(failure.value))
    assert named is not None
    replayed = replay(Path(named[1]), check=True)
    assert replayed.difference is None and replayed.calls > 20
