"""What the control plane tells of its prefix cache: every block that can be found, from its beginning to its end."""

from __future__ import annotations

import numpy as np
import pytest

from tests.core.driver import LIMITS, Driver, int32, prompt_of
from tests.core.oracle_log import Reader, Told
from tests.core.test_pools import KEY, Driven
from tokenspeed._core import Misuse
from tokenspeed._core.scheduler import block_hashes
from tokenspeed.batch import NOT_FINITE, CacheChange

STORED, REMOVED, CLEARED = CacheChange.STORED, CacheChange.REMOVED, CacheChange.CLEARED


class Logged(Driver):
    """A scheduler whose cache log is read."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.core.open_cache_log()
        self.reader = Reader(LIMITS.block_size)

    def told(self) -> list[Told]:
        return [record for events in self.core.take_cache_events() for record in self.reader.read(events)]

    def serve(self, request_id: int, prompt: list[int], **wishes: object) -> list[Told]:
        """What is told while a request lives alone."""
        assert self.submit(request_id, prompt, **({"max_tokens": 1} | wishes)) is None
        self.run_out()
        return self.told()


def names(tokens: list[int]) -> list[int]:
    hashes = block_hashes(b"k" * 16, b"", int32(tokens), LIMITS.block_size)
    return [int.from_bytes(each[:8], "little", signed=True) for each in hashes]


def stored(tokens: list[int], first: int = 0) -> list[Told]:
    """The records of a prompt's blocks, from block `first` on."""
    of, size = names(tokens), LIMITS.block_size
    blocks = [tuple(tokens[at * size : (at + 1) * size]) for at in range(len(of))]
    return [(STORED, of[at], of[at - 1] if at else None, blocks[at]) for at in range(first, len(of))]


def test_blocks_are_told_with_their_parents_and_tokens_once_they_can_be_found() -> None:
    d = Logged()
    prompt = prompt_of(10)
    assert d.submit(1, prompt, max_tokens=6) is None
    d.plan()
    assert d.told() == [], "nothing of it has landed"
    d.core.commit(1, int32([70]).reshape(1, 1), int32([1]))
    assert d.told() == stored(prompt)
    d.step(71)
    assert d.told() == []
    d.step(72)
    assert d.told() == stored([*prompt, 70, 71], first=2), "generated tokens are cached alike"


def test_a_block_is_told_once_however_many_compute_it() -> None:
    d = Logged()
    prompt = prompt_of(9)
    for request_id in (1, 2):
        assert d.submit(request_id, prompt, max_tokens=1) is None
    d.run_out()
    assert d.told() == stored(prompt)
    assert d.serve(3, [*prompt, 50, 51, 52]) == stored([*prompt, 50, 51, 52], first=2)


def test_an_evicted_block_is_told_and_a_chain_goes_from_its_end() -> None:
    d = Logged(num_blocks=4)
    first, second = prompt_of(13), prompt_of(13, start=100)
    assert d.serve(1, first) == stored(first)
    told = d.serve(2, second)
    assert [record for record in told if record[0] is REMOVED] == [(REMOVED, of, None, ()) for of in names(first)[::-1]]
    assert list(d.reader.live) == names(second)


def test_blocks_of_a_salted_request_are_never_told() -> None:
    d = Logged(num_blocks=4)
    assert d.serve(1, prompt_of(13), salt=b"tenant") == []
    assert d.serve(2, prompt_of(13, start=100)) == stored(prompt_of(13, start=100)), "nor is their end"


def test_what_a_failed_request_wrote_is_told_as_gone() -> None:
    d = Logged()
    prompt = prompt_of(9)
    assert d.submit(1, prompt, max_tokens=3) is None
    d.step(7)
    d.step(NOT_FINITE)
    told = d.told()
    assert told[:2] == stored(prompt) and sorted(told[2:]) == sorted((REMOVED, of, None, ()) for of in names(prompt))


def test_a_drop_of_all_is_one_record_and_one_of_some_names_them() -> None:
    d = Logged()
    kept, gone = prompt_of(9), prompt_of(9, start=100)
    d.serve(1, gone)
    assert d.submit(2, kept, max_tokens=3) is None
    d.step(7)
    assert d.told() == stored(kept)
    assert d.core.drop_cached() == 2
    assert d.told() == [(REMOVED, of, None, ()) for of in names(gone)[::-1]]
    d.run_out()
    assert d.core.drop_cached() > 0
    assert d.told() == [(CLEARED, 0, None, ())]
    d.core.drop_cached()
    assert d.told() == [], "there was nothing left to drop"
    assert d.serve(3, kept) == stored(kept), "and all begins anew"


def test_a_block_on_the_host_can_still_be_found() -> None:
    d = Logged(num_blocks=4, num_host_blocks=8)
    first, second = prompt_of(13), prompt_of(13, start=100)
    d.serve(1, first)
    for request_id, prompt in ((2, second), (3, first)):
        assert d.submit(request_id, prompt, max_tokens=1) is None
        while d.core.has_work:
            plan = d.must_plan()
            d.commit(plan, *[7] * plan.num_samples)
            d.land(*plan.copies[:, 0].tolist())
        told = d.told()
        assert told == (stored(second) if request_id == 2 else []), "the other's only moved"
    assert d.core.cached_tokens(3) == 12 and d.stats.blocks_loaded == 3


def test_a_log_begins_before_anything_is_cached() -> None:
    d = Driver()
    d.submit(1, prompt_of(9))
    with pytest.raises(Misuse, match="before the first request"):
        d.core.open_cache_log()
    d.step(7)
    assert d.core.take_cache_events() == []


def test_each_pool_tells_of_its_own_blocks() -> None:
    d = Driven()
    d.core.open_cache_log()
    first, second = prompt_of(9), prompt_of(9, start=100)
    d.submit(1, first)
    d.submit(2, second)
    d.run_out()
    told = {events.pool: Reader(LIMITS.block_size).read(events) for events in d.core.take_cache_events()}
    assert KEY == b"k" * 16
    assert told == {0: stored([*first, 5, 5, 5]), 1: stored([*second, 5, 5, 5])}
    d.core.drop_cached()
    assert [(events.pool, len(events.records)) for events in d.core.take_cache_events()] == [(0, 24), (1, 24)]


def test_a_log_changes_no_plan() -> None:
    rng = np.random.default_rng(5)
    prompts = [rng.integers(0, 3, int(rng.integers(1, 20))).tolist() for _ in range(60)]
    plans = []
    for opens in (False, True):
        d = Driver(num_blocks=8)
        if opens:
            d.core.open_cache_log()
        steps: list[object] = []
        for request_id, prompt in enumerate(prompts):
            steps.append(d.submit(request_id, prompt, max_tokens=3))
            if (plan := d.plan()) is not None:
                steps.append((plan.row_slot.tolist(), plan.table_delta.tolist(), plan.token_ids.tolist()))
                d.commit(plan, *[1] * plan.num_samples)
        plans.append(steps)
    assert plans[0] == plans[1]


def test_uncached_tokens_of_waiting_prompts_are_counted_as_they_come_and_go() -> None:
    d = Driver(num_blocks=4)
    d.submit(1, prompt_of(9), max_tokens=1)
    assert d.stats.waiting_uncached_tokens == 9
    d.run_out()
    assert d.stats.waiting_uncached_tokens == 0
    d.submit(2, [*prompt_of(9), 60], max_tokens=1)
    d.submit(3, prompt_of(5, start=70), max_tokens=1)
    assert d.stats.waiting_uncached_tokens == 2 + 5, "eight of the first ten are cached"
    d.core.abort(3)
    assert d.stats.waiting_uncached_tokens == 2
