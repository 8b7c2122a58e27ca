"""Blocks that go to the host and come back, one promise a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.core.driver import Driver, int32, prompt_of
from tokenspeed._core import Misuse, Policy
from tokenspeed.batch import NOT_FINITE, BatchLimits, Plan

TO_HOST, TO_DEVICE = 0, 1
OLD = prompt_of(16)
NEXT_TURN = [*OLD, 77]


class Tiers(Driver):
    """8 device blocks of 4 positions, 16 places on the host. Footprints are off: what counts here is memory."""

    def __init__(self, **sizes: Any) -> None:
        given: dict[str, Any] = {"num_blocks": 8, "num_host_blocks": 16, "policy": Policy(footprints=False)}
        super().__init__(**(given | sizes))
        self.directions: list[int] = []  # of all copies
        self.tickets: list[int] = []  # of those under way
        self.bound: list[int] = []
        self.cached: dict[int, int] = {}  # cached prompt tokens of requests that have ended

    def advance(self) -> Plan | None:
        """One step, launched and landed; its copies stay under way."""
        plan = self.plan()
        if plan:
            self.directions += plan.copies[:, 1].tolist()
            self.tickets += plan.copies[:, 0].tolist()
            self.bound += plan.bound_ids.tolist()
            for request_id, *_, cached in self.commit(plan, *[5] * plan.num_samples).entries():
                self.cached[request_id] = cached
        return plan

    def until_copies(self) -> list[int]:
        """Run until copies are under way; their tickets."""
        while not self.tickets:
            assert self.advance()
        return self.tickets

    def land_all(self, *, failing: bool = False) -> None:
        tickets, self.tickets = self.tickets, []
        self.land(*([] if failing else tickets), failed=tickets if failing else [])

    def run_all(self) -> None:
        while self.core.has_work:
            if not self.advance():
                assert self.tickets, "nothing moves"
            self.land_all()

    def old_is_partly_on_the_host(self) -> None:
        """The first half of OLD is on the device and the rest on the host; nothing runs."""
        self.submit(1, OLD, max_tokens=1)
        self.run_all()
        self.submit(2, prompt_of(20, start=100), max_tokens=1)
        self.run_all()
        assert self.directions == [TO_HOST] * 2 and self.stats.host_blocks_used == 2

    def fetch(self, request_id: int = 3) -> list[int]:
        """Submit the next turn of OLD and run until its blocks come back; their tickets, all that are under way."""
        self.submit(request_id, NEXT_TURN, max_tokens=1)
        self.until_copies()
        while TO_DEVICE not in self.directions:
            self.land_all()
            self.until_copies()
        for ticket, direction in zip(self.tickets[:], self.directions[-len(self.tickets) :], strict=True):
            if direction == TO_HOST:
                self.land(ticket)
                self.tickets.remove(ticket)
        return self.tickets


def test_what_shortage_would_evict_goes_to_the_host_and_comes_back() -> None:
    t = Tiers()
    t.old_is_partly_on_the_host()
    t.submit(3, NEXT_TURN, max_tokens=1)
    t.run_all()
    assert t.cached[3] == 16, "nothing was computed again"
    assert t.directions.count(TO_DEVICE) == t.stats.blocks_loaded == 2
    assert t.stats.blocks_offloaded == t.directions.count(TO_HOST)


def test_without_a_host_they_are_evicted() -> None:
    t = Tiers(num_host_blocks=0)
    for request_id, prompt in ((1, OLD), (2, prompt_of(20, start=100)), (3, NEXT_TURN)):
        t.submit(request_id, prompt, max_tokens=1)
        t.run_all()
    assert t.cached[3] == 12 and t.directions == []


def test_the_end_of_a_chain_goes_first() -> None:
    t = Tiers()
    t.submit(1, OLD, max_tokens=1)
    plan = t.must_plan()
    table = plan.table_delta[:, 2].tolist()
    t.commit(plan, 5)
    t.submit(2, prompt_of(20, start=100), max_tokens=1)
    assert t.must_plan().copies[:, 2].tolist() == [table[3], table[2]]


def test_a_step_may_have_copies_and_no_rows() -> None:
    t = Tiers()
    t.submit(1, OLD, max_tokens=1)
    t.run_all()
    t.submit(2, prompt_of(20, start=100), max_tokens=1)
    plan = t.must_plan()
    assert (plan.num_rows, plan.num_copies) == (0, 2)
    assert t.commit(plan).request_ids.tolist() == []
    assert t.plan() is None, "only the landing of the copies helps"
    assert t.stats.copies_in_flight == 2


def test_a_step_starts_no_more_copies_than_it_may() -> None:
    t = Tiers(limits=BatchLimits(max_rows=4, max_tokens=16, max_blocks=16, block_size=4, max_copies=1))
    t.submit(1, OLD, max_tokens=1)
    t.run_all()
    t.submit(2, prompt_of(20, start=100), max_tokens=1)
    assert [t.must_plan().num_copies for _ in range(2)] == [1, 1]


def test_a_prefix_is_not_used_before_its_copies_have_landed() -> None:
    t = Tiers()
    t.old_is_partly_on_the_host()
    first, second = t.fetch()
    t.submit(4, [*NEXT_TURN, 78], max_tokens=1)
    t.bound.clear()
    t.land(second)
    assert t.advance() is None and t.stats.running == 1 and t.stats.waiting == 1
    t.land(first)
    t.tickets.clear()
    t.run_all()
    assert t.bound == [3, 4] and t.cached == t.cached | {3: 16, 4: 16}, "who came meanwhile waited for the same blocks"


def test_who_starts_while_others_take_the_whole_step_is_bound_without_a_row() -> None:
    t = Tiers(limits=BatchLimits(max_rows=4, max_tokens=4, max_blocks=16, block_size=4), num_blocks=12)
    for request_id, prompt in ((1, OLD), (2, prompt_of(36, start=100))):
        t.submit(request_id, prompt, max_tokens=1)
        t.run_all()
    loads = list(t.fetch())
    t.submit(4, prompt_of(8, start=200), priority=-1)
    while 4 not in t.bound:
        t.advance()
        for ticket in set(t.tickets) - set(loads):
            t.land(ticket)
        t.tickets = list(loads)
    t.land(*loads)
    plan = t.must_plan()
    assert plan.bound_ids.tolist() == [3] and plan.num_rows == 1 and plan.row_computed.tolist() == [4]
    t.commit(plan, 5)
    plan = t.must_plan()
    assert plan.row_computed.tolist() == [8, 16] and plan.num_bound == 0


def test_a_load_that_fails_is_computed_again() -> None:
    t = Tiers()
    t.old_is_partly_on_the_host()
    t.fetch()
    t.land_all(failing=True)
    t.run_all()
    assert t.cached[3] == 8
    assert t.stats.blocks_used == t.stats.copies_in_flight == 0


def test_of_two_loads_of_which_one_fails_the_other_is_not_lost() -> None:
    t = Tiers()
    t.old_is_partly_on_the_host()
    first, second = t.fetch()
    t.land(first, failed=[second])
    t.tickets.clear()
    t.run_all()
    assert t.cached[3] == 12


def test_an_offload_that_fails_loses_the_block_and_frees_both_ends() -> None:
    t = Tiers()
    t.submit(1, OLD, max_tokens=1)
    t.run_all()
    t.submit(2, prompt_of(20, start=100), max_tokens=1)
    t.until_copies()
    t.land_all(failing=True)
    assert (t.stats.host_blocks_used, t.stats.blocks_free) == (0, 6)
    t.run_all()
    t.submit(3, NEXT_TURN, max_tokens=1)
    t.run_all()
    assert t.cached[3] == 8


@pytest.mark.parametrize("end", ["abort", "finish"])
def test_blocks_fetched_for_a_request_that_has_ended_are_cached(end: str) -> None:
    t = Tiers()
    t.old_is_partly_on_the_host()
    t.fetch()
    assert t.core.abort(3) if end == "abort" else t.core.finish(3, 0)
    assert not t.core.has_work and t.stats.copies_in_flight == 2
    t.land_all()
    assert t.stats.blocks_used == 0
    loaded = t.stats.blocks_loaded
    t.submit(4, NEXT_TURN, max_tokens=1)
    t.run_all()
    assert t.cached[4] == 16 and t.stats.blocks_loaded == loaded


def test_the_slot_of_a_fetch_that_was_aborted_is_released() -> None:
    t = Tiers()
    t.old_is_partly_on_the_host()
    t.fetch()
    t.core.abort(3)
    t.land_all()
    t.submit(4, prompt_of(2, start=200), max_tokens=1)
    plan = t.must_plan()
    assert plan.num_released == 1 and plan.bound_ids.tolist() == [4]


def test_what_a_failed_request_may_have_written_is_withdrawn_wherever_it_is() -> None:
    """Of a prefix that is being fetched: what is on the device, what is on its way, and what is still on the host."""
    t = Tiers(limits=BatchLimits(max_rows=4, max_tokens=16, max_blocks=16, block_size=4, max_copies=1), num_blocks=12)
    t.submit(1, OLD, max_tokens=1)
    t.run_all()
    t.submit(2, prompt_of(36, start=100), max_tokens=1)
    while not (plan := t.must_plan()).num_samples:
        t.commit(plan)
        t.land(*plan.copies[:, 0].tolist())
    t.commit(plan, NOT_FINITE)
    assert (t.stats.blocks_free, t.stats.host_blocks_used) == (10, 2), "room without a copy, half of OLD on the host"
    t.submit(3, NEXT_TURN, max_tokens=1)
    t.submit(4, OLD, reuse_prefix=False)
    plan = t.must_plan()
    assert plan.bound_ids.tolist() == [4] and plan.copies[:, 1].tolist() == [TO_DEVICE]
    t.tickets = plan.copies[:, 0].tolist()
    t.commit(plan, NOT_FINITE)
    assert t.advance() is None, "the other copy is not worth making"
    t.run_all()
    assert t.cached[3] == 0 and t.stats.blocks_loaded == 1 and t.stats.host_blocks_used == 0


def test_who_waits_for_a_copy_goes_on_when_its_content_is_withdrawn() -> None:
    t = Tiers(num_blocks=24, limits=BatchLimits(max_rows=4, max_tokens=64, max_blocks=16, block_size=4))
    t.submit(1, OLD, max_tokens=1)
    t.submit(2, OLD, max_tokens=20)  # computes the same blocks in the same step
    t.submit(3, prompt_of(60, start=100))
    t.until_copies()
    t.submit(4, NEXT_TURN, priority=-1)
    plan = t.must_plan()
    assert 4 not in plan.bound_ids, "its prefix is on its way to the host"
    t.commit(plan, NOT_FINITE)
    assert 4 in t.must_plan().bound_ids, "nobody may build on what request 2 wrote"


def test_what_another_request_computes_while_it_is_on_the_host_is_not_loaded() -> None:
    t = Tiers(num_blocks=16, limits=BatchLimits(max_rows=4, max_tokens=64, max_blocks=16, block_size=4, max_copies=1))
    t.submit(1, OLD, max_tokens=1)
    t.run_all()
    t.submit(2, prompt_of(60, start=100))
    while (plan := t.plan()) is None or not plan.num_samples:
        if plan:
            t.tickets += plan.copies[:, 0].tolist()
            t.commit(plan)
        t.land_all()
    t.commit(plan, NOT_FINITE)
    assert (t.stats.blocks_free, t.stats.host_blocks_used) == (16, 4), "of OLD nothing is on the device"
    t.submit(3, NEXT_TURN, max_tokens=1)
    t.submit(4, OLD, reuse_prefix=False)
    t.advance()
    assert t.bound[-1] == 4 and t.stats.copies_in_flight == 1, "one copy a step; request 4 computes the rest"
    t.advance()
    t.land_all()
    t.advance()
    assert t.cached[3] == 16 and t.stats.blocks_loaded == 1


def test_a_ticket_that_has_landed_is_used_again() -> None:
    t = Tiers()
    seen: set[int] = set()
    for turn in range(8):
        t.submit(turn, prompt_of(20, start=100 * turn), max_tokens=1)
        while t.core.has_work:
            t.advance()
            seen |= set(t.tickets)
            t.land_all()
    assert t.stats.blocks_offloaded > 20 and max(seen) < 5


def test_a_ticket_lands_once_and_by_its_name() -> None:
    t = Tiers()
    t.old_is_partly_on_the_host()
    first, second = t.fetch()
    before = t.core.dump()
    none = int32([])
    calls: list[Callable[[], object]] = [
        lambda: t.core.land_copies(int32([first, first]), none),
        lambda: t.core.land_copies(int32([first, second, first]), none),
        lambda: t.core.land_copies(int32([first]), int32([first])),
        lambda: t.core.land_copies(int32([first, 1000]), none),
        lambda: t.core.land_copies(int32([first]), int32([-1])),
        lambda: t.core.land_copies(np.array([first], np.int64), none),
        lambda: t.core.land_copies(np.array([[first]], np.int32), none),
    ]
    for call in calls:
        with pytest.raises(Misuse):
            call()
        assert t.core.dump() == before and t.core.check() is None
    t.land(first, second)
    with pytest.raises(Misuse, match="not under way"):
        t.core.land_copies(int32([first]), none)


def test_a_full_host_forgets_what_was_used_least_recently() -> None:
    t = Tiers(num_host_blocks=1)
    for request_id, start in ((1, 0), (2, 100), (3, 200)):
        t.submit(request_id, prompt_of(20, start=start), max_tokens=1)
        t.run_all()
    assert t.stats.host_blocks_used == 1 and t.stats.blocks_offloaded > 1
