"""The shadow device finds what it is there to find: plans that a scheduler must never make."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tests.core.shadow import TO_DEVICE, TO_HOST, Shadow
from tokenspeed.batch import BatchLimits, Plan, PlanBuffers

LIMITS = BatchLimits(max_rows=4, max_tokens=16, max_blocks=8, block_size=2, max_copies=4)
PROMPT = [3, 1, 4, 1]


class Device:
    """A shadow with 8 blocks of 2 positions and 4 places on the host, and plans in few words."""

    def __init__(self) -> None:
        self.shadow = Shadow(8, 4, LIMITS.block_size, 7, np.random.default_rng(0))
        self.shadow.not_finite = 0.0
        self.steps = 0
        for request_id in range(3):
            self.shadow.submit(request_id, PROMPT, b"")

    def launch(
        self,
        rows: Sequence[tuple[int, int, int]] = (),  # slot, new, computed
        *,
        bound: Sequence[tuple[int, int]] = (),  # slot, request
        blocks: Sequence[tuple[int, int, int]] = (),  # slot, position, block
        copies: Sequence[tuple[int, int, int, int]] = (),
        released: Sequence[int] = (),
    ) -> None:
        buffers = PlanBuffers(LIMITS)
        token_ids = [token for _, new, computed in rows for token in PROMPT[computed : computed + new]]
        samples = [row for row, (_, new, computed) in enumerate(rows) if computed + new == len(PROMPT)]
        for array, values in (
            (buffers.row_slot, [slot for slot, _, _ in rows]),
            (buffers.row_new, [new for _, new, _ in rows]),
            (buffers.row_computed, [computed for _, _, computed in rows]),
            (buffers.token_ids, token_ids),
            (buffers.sample_rows, samples),
            (buffers.table_delta, blocks),
            (buffers.bound, [(slot, index) for index, (slot, _) in enumerate(bound)]),
            (buffers.bound_ids, [request_id for _, request_id in bound]),
            (buffers.copies, copies),
            (buffers.released, released),
        ):
            if len(values):
                array[: len(values)] = values
        self.steps += 1
        self.shadow.launch(
            Plan(
                self.steps, buffers, len(rows), 0, len(token_ids), len(blocks), len(samples), len(bound), len(copies),
                len(released), 0,
            )
        )  # fmt: skip

    def first_request_is_cached(self) -> None:
        """Request 0 has computed its prompt into blocks 0 and 1 and is gone."""
        self.launch([(0, 4, 0)], bound=[(0, 0)], blocks=[(0, 0, 0), (0, 1, 1)])
        self.shadow.land()
        self.launch(released=[0])
        self.shadow.land()

    def offload(self) -> None:
        """Block 0 goes to place 2."""
        self.first_request_is_cached()
        self.launch(copies=[(7, TO_HOST, 0, 2)])

    def land(self, ticket: int = 7, *, failed: bool = False) -> None:
        self.shadow.land_copy(ticket, failed=failed)


def test_a_hit_reads_what_the_other_request_wrote() -> None:
    d = Device()
    d.first_request_is_cached()
    d.launch([(1, 2, 2)], bound=[(1, 1)], blocks=[(1, 0, 0), (1, 1, 3)])
    d.shadow.land()
    assert d.shadow.reads == 2


def test_a_block_that_goes_out_and_comes_back_elsewhere_still_has_its_content() -> None:
    d = Device()
    d.offload()
    d.land()
    d.launch(copies=[(8, TO_DEVICE, 2, 5)])
    assert d.shadow.content(8) == d.shadow.chains.of(b"", PROMPT[:2])
    d.land(8)
    d.launch([(1, 2, 2)], bound=[(1, 1)], blocks=[(1, 0, 5), (1, 1, 3)])
    for _ in range(3):
        d.shadow.land()


def test_garbage_of_a_copy_that_failed_is_not_taken_for_content() -> None:
    d = Device()
    d.offload()
    d.land(failed=True)
    d.launch(copies=[(8, TO_DEVICE, 2, 5)])
    assert d.shadow.content(8) != d.shadow.chains.of(b"", PROMPT[:2])


def test_a_block_that_has_not_come_back_is_not_readable() -> None:
    d = Device()
    d.offload()
    d.land()
    d.launch(copies=[(8, TO_DEVICE, 2, 5)])
    with pytest.raises(AssertionError, match="while it is being copied"):
        d.launch([(1, 2, 2)], bound=[(1, 1)], blocks=[(1, 0, 5), (1, 1, 3)])


def test_a_block_on_its_way_out_is_not_handed_out() -> None:
    d = Device()
    d.offload()
    with pytest.raises(AssertionError, match="while it is being copied"):
        d.launch([(1, 2, 0)], bound=[(1, 1)], blocks=[(1, 0, 0)])


def test_a_block_in_use_is_not_copied() -> None:
    d = Device()
    d.launch([(0, 4, 0)], bound=[(0, 0)], blocks=[(0, 0, 0), (0, 1, 1)])
    with pytest.raises(AssertionError, match="while somebody uses it"):
        d.launch(copies=[(7, TO_HOST, 0, 2)])


def test_a_place_on_the_host_takes_part_in_one_copy_at_a_time() -> None:
    d = Device()
    d.offload()
    with pytest.raises(AssertionError, match="a place is copied twice"):
        d.launch(copies=[(8, TO_HOST, 1, 2)])


def test_a_ticket_is_given_once_at_a_time() -> None:
    d = Device()
    d.offload()
    with pytest.raises(AssertionError, match="a ticket is given twice"):
        d.launch(copies=[(7, TO_HOST, 1, 3)])


def test_a_block_is_not_written_while_a_launched_step_reads_it() -> None:
    d = Device()
    d.launch([(0, 4, 0)], bound=[(0, 0)], blocks=[(0, 0, 0), (0, 1, 1)])
    with pytest.raises(AssertionError, match="before its last writer has landed"):
        d.launch([(1, 2, 0)], bound=[(1, 1)], blocks=[(1, 0, 0)])


def test_a_slot_that_was_bound_without_a_row_is_judged_by_its_first_row() -> None:
    """Request 1 reads block 0; request 2 is bound to it while that step is in flight, as a hit or as a fresh block."""
    for computed, fine in ((2, True), (0, False)):
        d = Device()
        d.first_request_is_cached()
        d.launch([(1, 2, 2)], bound=[(1, 1)], blocks=[(1, 0, 0), (1, 1, 3)])
        d.launch(bound=[(2, 2)], blocks=[(2, 0, 0), (2, 1, 4)])
        if fine:
            d.launch([(2, 2, computed)])
        else:
            with pytest.raises(AssertionError, match="handed out before it had landed"):
                d.launch([(2, 2, computed)])
