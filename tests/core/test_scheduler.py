"""The compiled scheduler, one promise a test."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.core.driver import LIMITS, Driver, finishes, int32, prompt_of
from tokenspeed._core import Misuse, Policy, Refusal, Scheduler
from tokenspeed.batch import NOT_FINITE, ON_DEVICE, BatchLimits, Finish, PlanBuffers

# --- a request's walk ---


def test_a_prompt_is_computed_in_one_step_and_samples_one_token() -> None:
    d = Driver()
    assert d.submit(7, range(10)) is None
    plan = d.must_plan()
    assert (plan.row_new.tolist(), plan.row_computed.tolist(), plan.num_decode) == ([10], [0], 0)
    assert plan.token_ids.tolist() == list(range(10))
    assert plan.sample_rows.tolist() == [0]
    assert plan.bound_ids.tolist() == [7] and plan.bound.tolist() == [[plan.row_slot[0], 0]]
    assert plan.table_delta[:, 1].tolist() == [0, 1, 2]
    outputs = d.commit(plan, 42)
    assert outputs.request_ids.tolist() == [7] and outputs.tokens.tolist() == [[42]]
    tokens, prompt_length = d.core.tokens_of(7)
    assert tokens.tolist() == [*range(10), 42] and prompt_length == 10


def test_a_decode_row_computes_the_token_before_it() -> None:
    d = Driver()
    d.submit(1, range(10))
    d.step(42)
    plan = d.must_plan()
    assert (plan.row_new.tolist(), plan.row_computed.tolist(), plan.num_decode) == ([1], [10], 1)
    assert plan.token_ids.tolist() == [42] and plan.num_bound == 0


def test_dropped_blocks_are_free_and_found_no_more() -> None:
    d = Driver()
    d.submit(1, range(12))
    d.step(42)
    d.core.abort(1)
    d.run_out()
    cached = d.core.stats().blocks_cached
    assert cached > 0 and d.core.drop_cached() == cached
    assert (d.core.stats().blocks_cached, d.core.drop_cached(), d.core.check()) == (0, 0, None)
    d.submit(2, range(12))
    assert d.must_plan().row_computed.tolist() == [0]


def test_under_overlap_the_token_is_taken_from_the_device() -> None:
    d = Driver()
    d.submit(1, range(10))
    first, second = d.must_plan(), d.must_plan()
    assert second.token_ids.tolist() == [ON_DEVICE] and second.row_computed.tolist() == [10]
    with pytest.raises(Misuse, match="in flight"):
        d.plan()
    d.commit(first, 1)
    d.commit(second, 2)
    assert d.core.tokens_of(1)[0].tolist() == [*range(10), 1, 2]


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    d = Driver()
    d.submit(1, range(4))
    d.step(9)
    d.submit(2, range(20, 50))
    plan = d.must_plan()
    assert (plan.row_new.tolist(), plan.num_decode, plan.sample_rows.tolist()) == ([1, 15], 1, [0])
    d.commit(plan, 9)
    plan = d.must_plan()
    assert (plan.row_new.tolist(), plan.row_computed.tolist()) == ([1, 15], [5, 15])
    assert plan.sample_rows.tolist() == [0, 1]


def test_several_prefills_are_in_flight_oldest_first() -> None:
    d = Driver()
    d.submit(1, range(20))
    d.submit(2, range(30, 50))
    d.commit(d.must_plan())
    plan = d.must_plan()
    assert plan.row_new.tolist() == [4, 12]
    d.commit(plan, 9)
    plan = d.must_plan()
    assert plan.row_new.tolist() == [1, 8]


# --- ends ---


def test_max_tokens_ends_with_length() -> None:
    d = Driver()
    d.submit(1, range(3), max_tokens=2)
    assert finishes(d.step(8)) == []
    assert finishes(d.step(8)) == [(1, Finish.LENGTH)]
    assert not d.core.has_work


def test_the_context_ends_with_length() -> None:
    d = Driver(max_model_len=5)
    d.submit(1, range(3))
    d.step(8)
    assert finishes(d.step(8)) == [(1, Finish.LENGTH)]


def test_a_stop_id_ends_with_stop_and_is_named() -> None:
    d = Driver()
    d.submit(1, range(3), stop=[17, 4])
    d.step(8)
    outputs = d.step(17)
    assert finishes(outputs) == [(1, Finish.STOP)] and outputs.stop_ids.tolist() == [17]


def test_a_stop_id_before_min_tokens_does_not_end() -> None:
    d = Driver()
    d.submit(1, range(3), stop=[8], min_tokens=3)
    assert finishes(d.step(8)) == finishes(d.step(8)) == []
    assert finishes(d.step(8)) == [(1, Finish.STOP)]


def test_no_row_is_planned_past_the_length_while_the_last_token_is_in_flight() -> None:
    d = Driver()
    d.submit(1, range(3), max_tokens=1)
    plan = d.must_plan()
    assert d.plan() is None
    assert finishes(d.commit(plan, 8)) == [(1, Finish.LENGTH)]


def test_a_request_that_ended_drains_until_its_last_step_lands() -> None:
    d = Driver()
    d.submit(1, range(4), stop=[8])
    first, second = d.must_plan(), d.must_plan()
    assert finishes(d.commit(first, 8)) == [(1, Finish.STOP)]
    assert (d.stats.running, d.stats.draining, d.stats.blocks_used) == (0, 1, 2)
    assert d.submit(1, range(4)) is Refusal.DUPLICATE_ID
    assert d.commit(second, 3).request_ids.tolist() == []
    assert (d.stats.draining, d.stats.blocks_used) == (0, 0)
    assert d.submit(1, range(4)) is None


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("end", ["abort", "finish"])
def test_an_end_from_outside_frees_everything_in_any_state(steps: int, end: str) -> None:
    d = Driver()
    d.submit(1, range(20))
    plans = [d.must_plan() for _ in range(steps)]
    assert d.core.abort(1) if end == "abort" else d.core.finish(1, 0)
    assert not d.core.abort(1) and not d.core.finish(1, 0)
    for plan in plans:
        assert d.commit(plan, *[3] * plan.num_samples).request_ids.tolist() == []
    assert not d.core.has_work and d.stats.blocks_used == 0


def test_finish_does_not_count_the_tokens_after_the_stop() -> None:
    d = Driver()
    d.submit(1, range(3))
    for token in (1, 2, 3):
        d.step(token)
    with pytest.raises(Misuse, match="only 3"):
        d.core.finish(1, 4)
    assert d.core.finish(1, 2)
    assert d.stats.generated_tokens == 2


def test_outputs_stay_as_they_were_when_later_steps_commit() -> None:
    d = Driver()
    d.submit(7, prompt_of(9), stop=[4])
    first, last = d.step(3), d.step(4)
    assert list(first.entries()) == [(7, 0, 3, 1, Finish.NONE, -1, 0)]
    assert list(last.entries()) == [(7, 0, 4, 1, Finish.STOP, 4, 0)]
    assert first.tokens.tolist() == [[3]] and not first.tokens.flags.writeable


def test_a_freed_slot_is_reported_once() -> None:
    d = Driver()
    d.submit(1, range(3), max_tokens=1)
    slot = d.must_plan().row_slot[0]
    d.core.commit(1, int32([9]).reshape(1, 1), int32([1]))
    d.submit(2, range(3))
    plan = d.must_plan()
    assert plan.released.tolist() == [slot]
    d.commit(plan, 9)
    assert d.must_plan().num_released == 0


# --- the prefix cache ---


def test_a_prompt_seen_before_is_not_computed_again_but_for_its_last_token() -> None:
    d = Driver()
    d.submit(1, prompt_of(12), max_tokens=1)
    d.run_out()
    d.submit(2, prompt_of(12), max_tokens=1)
    plan = d.must_plan()
    assert (plan.row_computed.tolist(), plan.row_new.tolist()) == ([8], [4])
    assert d.core.cached_tokens(2) == 8
    d.commit(plan, 9)
    assert d.core.cached_tokens(2) == 8, "known with the outputs that end it"
    d.submit(3, prompt_of(3))
    d.step(9)
    with pytest.raises(Misuse):
        d.core.cached_tokens(2)
    assert (d.stats.prompt_tokens, d.stats.cached_prompt_tokens) == (27, 8)


def test_generated_tokens_are_cached_like_prompt_tokens() -> None:
    d = Driver()
    d.submit(1, prompt_of(6), max_tokens=7)
    d.run_out(token=77)
    d.submit(2, [*prompt_of(6), *[77] * 7])
    assert d.must_plan().row_computed.tolist() == [12]


def test_a_block_is_not_shared_before_the_step_that_fills_it_has_landed() -> None:
    d = Driver()
    d.submit(1, prompt_of(9))
    first = d.must_plan()
    d.submit(2, prompt_of(9))
    second = d.must_plan()
    assert second.row_computed.tolist() == [9, 0]
    d.commit(first, 5)
    d.commit(second, 5, 5)
    assert d.stats.cached_prompt_tokens == 0


def test_tenants_share_nothing() -> None:
    d = Driver()
    d.submit(1, prompt_of(12), max_tokens=1, salt=b"one")
    d.run_out()
    d.submit(2, prompt_of(12), max_tokens=1, salt=b"two")
    assert d.must_plan().row_computed.tolist() == [0]


def test_a_block_matches_only_after_the_same_prefix() -> None:
    d = Driver()
    d.submit(1, [*prompt_of(4), *prompt_of(4), 1], max_tokens=1)
    d.run_out()
    d.submit(2, [*prompt_of(4, start=50), *prompt_of(4), 1], max_tokens=1)
    assert d.must_plan().row_computed.tolist() == [0]


def test_without_reuse_a_request_computes_all_and_still_publishes() -> None:
    d = Driver()
    for request_id, reuse, computed in ((1, False, 0), (2, False, 0), (3, True, 8)):
        d.submit(request_id, prompt_of(12), max_tokens=1, reuse_prefix=reuse)
        plan = d.must_plan()
        assert plan.row_computed.tolist() == [computed]
        d.commit(plan, 5)


def test_without_prefix_caching_nothing_is_kept() -> None:
    d = Driver(prefix_caching=False)
    for request_id in (1, 2):
        d.submit(request_id, prompt_of(12), max_tokens=1)
        assert d.must_plan().row_computed.tolist() == [0]
        d.core.commit(request_id, int32([5]).reshape(1, 1), int32([1]))
        assert (d.stats.blocks_free, d.stats.blocks_cached) == (16, 0)


def test_the_least_recently_used_chain_loses_its_tail_first() -> None:
    d = Driver(num_blocks=8)
    d.submit(1, prompt_of(12), max_tokens=1)
    d.submit(2, prompt_of(12, start=50), max_tokens=1)
    d.run_out()
    assert (d.stats.blocks_cached, d.stats.blocks_free) == (6, 2)
    d.submit(3, prompt_of(15, start=90), max_tokens=1)  # takes 2 free blocks and evicts 2 of request 1
    d.run_out()
    d.submit(4, prompt_of(12, start=50), max_tokens=1)
    assert d.must_plan().row_computed.tolist() == [8]


def test_logits_that_are_not_finite_end_one_request_and_its_blocks_leave_the_cache() -> None:
    d = Driver()
    d.submit(1, prompt_of(9))
    d.submit(2, prompt_of(5, start=50), max_tokens=2)
    outputs = d.step(NOT_FINITE, 6)
    assert finishes(outputs) == [(1, Finish.ERROR)]
    assert outputs.num_tokens.tolist() == [0, 1]
    d.run_out()
    d.submit(3, prompt_of(9))
    assert d.must_plan().row_computed.tolist() == [0]


def test_a_later_failure_withdraws_blocks_that_were_published_before() -> None:
    d = Driver()
    d.submit(1, prompt_of(9))
    d.step(6)
    assert finishes(d.step(NOT_FINITE)) == [(1, Finish.ERROR)]
    assert (d.stats.blocks_cached, d.stats.blocks_free) == (0, 16)


def test_a_failure_leaves_the_blocks_that_it_only_read() -> None:
    d = Driver()
    d.submit(1, prompt_of(8), max_tokens=1)
    d.run_out()
    d.submit(2, prompt_of(13))
    d.step(NOT_FINITE)
    assert (d.stats.blocks_cached, d.stats.blocks_used) == (2, 0)


# --- shortage ---


def test_only_the_head_of_the_queue_is_admitted() -> None:
    d = Driver(num_blocks=8, policy=Policy(footprints=False))
    d.submit(1, prompt_of(12))
    d.step(5)
    d.submit(2, prompt_of(20, start=50))
    d.submit(3, prompt_of(2, start=90))
    assert d.must_plan().num_rows == 1
    assert d.stats.waiting == 2


def test_lower_priority_numbers_go_first_then_earlier_arrivals() -> None:
    d = Driver(LIMITS, num_blocks=32)
    for request_id, priority in ((1, 5), (2, 0), (3, -1), (4, 0)):
        d.submit(request_id, prompt_of(2, start=10 * request_id), priority=priority)
    assert d.must_plan().bound_ids.tolist() == [3, 2, 4, 1]


def test_the_youngest_is_preempted_and_computed_again_from_what_is_cached() -> None:
    d = Driver(num_blocks=8)
    d.submit(1, prompt_of(11), max_tokens=20)
    d.submit(2, prompt_of(5, start=50), max_tokens=20)
    order = []
    while d.core.has_work:
        plan = d.must_plan()
        order += plan.bound_ids.tolist()
        d.commit(plan, *[7] * plan.num_samples)
        if d.stats.preemptions and d.stats.waiting:
            assert d.core.tokens_of(2)[0].tolist()[:5] == prompt_of(5, start=50)
    assert d.stats.preemptions >= 1
    assert order[:2] == [1, 2] and set(order[2:]) == {2}, "the older request is never preempted"
    assert d.stats.generated_tokens == 40


def test_under_overlap_a_preempted_request_keeps_the_token_of_its_landed_step() -> None:
    limits = BatchLimits(max_rows=2, max_tokens=16, max_blocks=4, block_size=4)
    d = Driver(limits, num_blocks=4, max_model_len=16)
    d.submit(1, prompt_of(4))
    d.submit(2, prompt_of(3, start=50))
    flight = [d.must_plan()]
    generated: dict[int, int] = {1: 0, 2: 0}
    while d.core.has_work:
        plan = d.plan()
        if plan:
            flight.append(plan)
        if len(flight) == 2 or not plan:
            landed = flight.pop(0)
            outputs = d.commit(landed, *[7] * landed.num_samples)
            for request_id in outputs.request_ids.tolist():
                generated[request_id] += 1
    assert d.stats.preemptions >= 1
    assert generated == {1: 12, 2: 13}, "each reaches the whole cache, no token is lost or sampled twice"


def test_a_lone_request_can_fill_the_whole_cache() -> None:
    d = Driver(num_blocks=3, max_model_len=64)
    assert d.core.max_length == 12
    d.submit(1, prompt_of(2))
    assert d.run_out() == [(1, Finish.LENGTH)]
    assert d.stats.generated_tokens == 10


def test_an_admission_leaves_a_block_for_each_running_request() -> None:
    d = Driver(num_blocks=4)
    d.submit(1, prompt_of(4))
    d.step(5)
    d.submit(2, prompt_of(8, start=50))  # needs 3 blocks with its first new token; 3 are free, 1 is kept
    d.step(5)
    assert d.stats.waiting == 1


def test_admissions_stop_at_the_table_deltas_of_a_step() -> None:
    limits = BatchLimits(max_rows=8, max_tokens=16, max_blocks=6, block_size=4)
    d = Driver(limits, num_blocks=64)
    d.submit(0, prompt_of(22), max_tokens=1)
    d.run_out()
    for request_id in range(1, 9):  # 6 blocks each, 5 of them hits: tokens and blocks for all, 18 deltas for 3
        d.submit(request_id, prompt_of(22), max_tokens=1)
    assert limits.max_deltas == 18
    plan = d.must_plan()
    assert (plan.num_rows, plan.num_deltas) == (3, 18)


# --- bad input ---


def test_what_cannot_be_served_is_refused_by_name() -> None:
    d = Driver(num_blocks=4, max_queued=2, max_model_len=18)
    assert d.submit(1, []) is Refusal.EMPTY
    assert d.submit(1, [3, -1]) is Refusal.BAD_TOKEN
    assert d.submit(1, [3], stop=[-2]) is Refusal.BAD_TOKEN
    assert d.submit(1, prompt_of(18)) is Refusal.TOO_LONG
    assert d.submit(1, prompt_of(16)) is Refusal.TOO_LONG_FOR_CACHE
    assert d.submit(1, prompt_of(15)) is None
    assert d.submit(1, prompt_of(2)) is Refusal.DUPLICATE_ID
    assert d.submit(2, prompt_of(2)) is None
    assert d.submit(3, prompt_of(2)) is Refusal.QUEUE_FULL
    assert d.core.check() is None and d.stats.waiting == 2


def test_misuse_is_an_error_for_that_call_alone() -> None:
    d = Driver()
    d.submit(1, prompt_of(5))
    plan = d.must_plan()
    before = d.core.dump()
    one, count = int32([9]).reshape(1, 1), int32([1])
    calls: list[Callable[[], object]] = [
        lambda: d.core.commit(plan.step + 1, one, count),
        lambda: d.core.commit(plan.step, one.reshape(1), count),
        lambda: d.core.commit(plan.step, int32([9, 9]).reshape(2, 1), int32([1, 1])),
        lambda: d.core.commit(plan.step, int32([9, 9]).reshape(1, 2), count),
        lambda: d.core.commit(plan.step, one.astype(np.int64), count),
        lambda: d.core.commit(plan.step, int32([-2]).reshape(1, 1), count),
        lambda: d.core.commit(plan.step, one, int32([2])),
        lambda: d.core.plan(-5.0, d.buffers[0]),
        lambda: d.core.plan(float("nan"), d.buffers[0]),
        lambda: d.core.plan(9.0, PlanBuffers(BatchLimits(2, 8, 4, 4))),
        lambda: d.core.tokens_of(99),
        lambda: d.core.cached_tokens(99),
        lambda: d.core.finish(1, -1),
        lambda: d.submit(2, [1], max_tokens=-1),
        lambda: d.submit(2, [1], max_tokens=True),
        lambda: d.submit(2, [1], min_tokens=-1),
        lambda: d.core.submit(2, np.zeros(3, np.int64), now=0.0, max_tokens=1, stop_ids=int32([])),
        lambda: d.core.submit(2, np.zeros((2, 2), np.int32), now=0.0, max_tokens=1, stop_ids=int32([])),
    ]
    for call in calls:
        with pytest.raises(Misuse):
            call()
        assert d.core.dump() == before and d.core.check() is None
    d.commit(plan, 9)
    with pytest.raises(Misuse, match="not the oldest"):
        d.core.commit(plan.step, one, count)


def test_a_scheduler_of_impossible_sizes_is_not_built() -> None:
    for sizes in ({"num_blocks": 0}, {"max_model_len": 0}, {"max_queued": 0}, {"num_blocks": True}):
        with pytest.raises(Misuse):
            Driver(**sizes)
    with pytest.raises(Misuse, match="max_tokens"):
        Driver(BatchLimits(max_rows=8, max_tokens=4, max_blocks=4, block_size=4))
    with pytest.raises(Misuse, match="16 bytes"):
        Scheduler(num_blocks=4, limits=LIMITS, max_model_len=8, max_queued=1, prefix_caching=True, hash_key=b"short")


def test_a_huge_max_tokens_is_the_rest_of_the_context() -> None:
    d = Driver(max_model_len=6)
    d.submit(1, range(3), max_tokens=2**40)
    assert d.run_out() == [(1, Finish.LENGTH)]
    assert d.stats.generated_tokens == 3


def test_dump_shows_each_request_in_plain_data() -> None:
    d = Driver()
    d.submit(1, prompt_of(5))
    d.step(9)
    d.submit(2, prompt_of(30, start=50))
    d.must_plan()
    d.submit(3, prompt_of(2))
    requests = d.core.dump()["requests"]
    assert isinstance(requests, list)
    assert [(r["id"], r["state"]) for r in requests] == [(1, "Decoding"), (2, "Prefilling"), (3, "Waiting")]
    assert requests[1]["known"] == 30 and requests[1]["computed"] == 15 and len(requests[1]["blocks"]) == 8
