"""Who goes first, who waits and who is refused: the rules on top of csrc/policy.h, one promise a test."""

from __future__ import annotations

from typing import Any

import pytest

from tests.core.driver import Driver, finishes, int32, prompt_of
from tokenspeed._core import Policy, Refusal
from tokenspeed.batch import BatchLimits

ALONE = Policy(footprints=False)


def bound(d: Driver, steps: int, seconds: float = 1.0) -> list[int]:
    """The requests that so many steps bind; all samples are 5."""
    ids = []
    for _ in range(steps):
        plan = d.must_plan(seconds)
        ids += plan.bound_ids.tolist()
        d.commit(plan, *[5] * plan.num_samples)
    return ids


def teach(d: Driver, seconds_a_token: float = 0.01) -> None:
    """Twenty steps that take so long for each token, so that the step-time model is trusted."""
    for i in range(20):
        d.submit(1000 + i, prompt_of(1 + i % 15, start=1000 * (1 + i)), max_tokens=1)
        plan = d.must_plan(0.0)
        d.commit(plan, 5, seconds=seconds_a_token * plan.num_tokens)
    assert not d.core.has_work


# --- the order of prompts ---


def test_before_anything_is_known_prompts_go_in_the_order_of_their_arrival() -> None:
    d = Driver(num_blocks=64, policy=ALONE)
    d.submit(1, prompt_of(40))
    d.submit(2, prompt_of(4, start=50))
    assert bound(d, 3) == [1, 2]


def test_a_short_prompt_overtakes_a_long_one_at_the_border_of_a_chunk() -> None:
    d = Driver(num_blocks=64, policy=ALONE)
    teach(d)
    d.submit(1, prompt_of(40))
    long = d.must_plan(0.01).row_slot[0]
    d.core.commit(d.core.dump()["last_planned"], int32([]).reshape(0, 1), int32([]))  # type: ignore[arg-type]
    d.submit(2, prompt_of(4, start=50))
    plan = d.must_plan(0.01)
    assert plan.bound_ids.tolist() == [2]
    assert (plan.row_new.tolist(), plan.row_computed.tolist()) == ([4, 12], [0, 16]) and plan.row_slot[1] == long


def test_the_cached_part_of_a_prompt_does_not_make_it_long() -> None:
    d = Driver(num_blocks=64, policy=ALONE)
    d.submit(1, prompt_of(41), max_tokens=1)
    d.run_out()
    teach(d)
    d.submit(2, prompt_of(12, start=50))
    d.submit(3, prompt_of(42))
    assert d.must_plan(0.01).bound_ids.tolist() == [3, 2]


def test_a_long_prompt_is_overtaken_only_for_a_time() -> None:
    """A short prompt arrives at every step and would fill it."""
    d = Driver(num_blocks=64, max_queued=64, policy=ALONE)
    teach(d)
    d.submit(1, prompt_of(48), max_tokens=1)
    arrived, overtaken = d.now, 0
    for i in range(60):
        d.submit(2 + i, prompt_of(15, start=100 + i), max_tokens=1, reuse_prefix=False)
        plan = d.must_plan(0.16)
        overtaken += plan.row_new.tolist()[:1] == [15]
        if (1, 2) in finishes(d.commit(plan, *[5] * plan.num_samples, seconds=0.01 * plan.num_tokens)):
            break
    patience = 8 * 48 * 0.01
    assert overtaken >= 10, "short ones went first"
    assert patience / 2 < d.now - arrived < 2 * patience


def test_a_lower_priority_number_goes_first_whatever_its_length() -> None:
    d = Driver(num_blocks=64, policy=ALONE)
    teach(d)
    d.submit(1, prompt_of(4))
    d.submit(2, prompt_of(40, start=50), priority=-1)
    assert d.must_plan(0.01).bound_ids.tolist() == [2]


def test_who_gives_way_is_the_last_by_priority_and_not_the_last_admitted() -> None:
    d = Driver(num_blocks=8, policy=ALONE)
    d.submit(1, prompt_of(8), priority=1)
    d.submit(2, prompt_of(8, start=50), priority=0)
    bound(d, 1)
    while d.stats.preemptions == 0:
        bound(d, 1)
    states = {request["id"]: request["state"] for request in d.core.dump()["requests"]}  # type: ignore[attr-defined]
    assert states == {1: "Waiting", 2: "Decoding"}


# --- sessions ---


def two_sessions(num_blocks: int = 16, **policy: Any) -> Driver:
    """Of 16 blocks or so session 1, which is idle, has 6, and request 2 of session 2, which goes on, as many."""
    d = Driver(num_blocks=num_blocks, policy=Policy(**policy))
    d.submit(1, prompt_of(23), session=1, max_tokens=1)
    d.submit(2, prompt_of(20, start=100), session=2, max_tokens=100)
    bound(d, 3)
    assert (d.stats.running, d.stats.sessions_resident) == (1, 2)
    return d


def test_a_session_that_does_not_fit_waits_and_a_resident_one_goes_on() -> None:
    d = two_sessions()
    d.submit(3, prompt_of(23, start=200), session=3)
    d.submit(4, [*prompt_of(23), 7], session=1, max_tokens=1)
    assert bound(d, 2) == [4]
    assert d.stats.sessions_waiting == 1


def test_without_footprints_it_takes_what_others_left_in_the_cache() -> None:
    d = Driver(num_blocks=16, policy=ALONE)
    d.submit(1, prompt_of(23), session=1, max_tokens=1)
    d.submit(2, prompt_of(20, start=100), session=2, max_tokens=100)
    bound(d, 3)
    d.submit(3, prompt_of(23, start=200), session=3)
    assert bound(d, 1) == [3]


def test_an_idle_session_gives_its_place_away_after_a_while() -> None:
    d = two_sessions()
    d.submit(3, prompt_of(23, start=200), session=3)
    assert bound(d, 1, seconds=80) == []
    assert bound(d, 1, seconds=20) == [3]
    assert d.stats.sessions_resident == 2


def test_on_an_idle_machine_it_gives_its_place_away_at_once() -> None:
    d = two_sessions()
    d.core.abort(2)
    d.submit(3, prompt_of(40, start=200), session=3)
    assert bound(d, 1) == [3]


@pytest.mark.parametrize(("length", "waiting"), [(35, 0), (36, 1)])
def test_two_requests_of_one_session_count_once(length: int, waiting: int) -> None:
    d = Driver(num_blocks=16)
    d.submit(1, prompt_of(23), session=1)
    d.submit(2, prompt_of(23), session=1)
    d.submit(3, prompt_of(length, start=100), session=2)
    d.must_plan()
    assert d.stats.sessions_waiting == waiting, "of 16 blocks sessions may have 15: 6 and 9, not 6 and 10"


def test_a_session_that_is_not_named_is_recognised_by_its_prompt() -> None:
    d = Driver(num_blocks=16)
    for request_id, prompt in ((1, prompt_of(16)), (2, [*prompt_of(16), 5, 6]), (3, prompt_of(8, start=100))):
        d.submit(request_id, prompt, max_tokens=1)
        d.run_out()
    assert d.stats.sessions_resident == 2


def test_when_a_session_gets_its_place_all_its_requests_do() -> None:
    d = two_sessions()
    d.submit(3, prompt_of(11, start=200), session=3)
    d.submit(4, prompt_of(43, start=300), session=4)
    d.submit(5, prompt_of(11, start=200), session=3)
    assert bound(d, 1) == [3, 5]
    assert d.stats.sessions_waiting == 1, "session 4"


def test_sessions_that_grow_past_the_cache_do_not_push_each_other_out_in_a_circle() -> None:
    """Beside a stream that goes on three sessions grow to 6 blocks, and two of them fit: these keep their hits."""
    d = Driver(BatchLimits(max_rows=4, max_tokens=128, max_blocks=16, block_size=4), num_blocks=24)
    d.submit(9, prompt_of(19, start=900), session=9, max_tokens=40)
    waiting: set[int] = set()
    for turn in range(8):
        before = d.stats.cached_prompt_tokens
        for session in {1, 2, 3} - waiting:
            length = min(8 + 4 * turn, 23)
            d.submit(10 * turn + session, prompt_of(length, start=100 * session), session=session, max_tokens=1)
            waiting.add(session)
        for _ in range(2):
            plan = d.must_plan()
            ended = finishes(d.commit(plan, *[5] * plan.num_samples))
            waiting -= {request_id % 10 for request_id, _ in ended}
        if turn >= 4:
            assert d.stats.cached_prompt_tokens - before >= 2 * 16, "of 23 prompt tokens each"
    assert d.stats.sessions_waiting == 1


def test_a_session_that_comes_back_larger_takes_the_room_of_the_one_that_is_idle_longest() -> None:
    d = Driver(num_blocks=30)
    for session in (1, 2, 3):
        d.submit(session, prompt_of(28, start=100 * session), session=session, max_tokens=1)
        d.run_out()
    assert d.stats.sessions_resident == 3, "of 27 blocks they have 24"
    d.submit(4, prompt_of(48, start=300), session=3, max_tokens=1)
    assert d.stats.sessions_resident == 2, "5 blocks more"
    d.submit(5, prompt_of(28, start=200), session=2, max_tokens=9)
    d.submit(6, prompt_of(28, start=100), session=1, max_tokens=9)
    assert bound(d, 3) == [4, 5], "session 1 has lost its place"
    assert d.stats.sessions_waiting == 1


def test_where_all_are_at_work_a_session_that_comes_back_too_large_waits() -> None:
    d = Driver(num_blocks=30)
    d.submit(1, prompt_of(28, start=100), session=1, max_tokens=1)
    d.run_out()
    d.submit(2, prompt_of(60, start=200), session=2, max_tokens=50)
    bound(d, 3)
    d.submit(3, prompt_of(60, start=100), session=1)
    assert bound(d, 3) == [] and d.stats.sessions_waiting == 1


def test_a_smaller_session_passes_one_that_does_not_fit_but_not_for_ever() -> None:
    d = two_sessions()
    d.submit(3, prompt_of(23, start=200), session=3, now=3.0)
    d.submit(4, prompt_of(7, start=300), session=4, max_tokens=1, now=3.0)
    assert bound(d, 1) == [4], "2 of the 3 blocks that are left"
    d = two_sessions(num_blocks=18)
    d.submit(3, prompt_of(23, start=200), session=3, now=3.0)
    for request_id in (4, 5):
        d.submit(request_id, prompt_of(6, start=100 * request_id), session=request_id, max_tokens=1, now=3.0)
    assert bound(d, 1) == [4, 5], "4 of the 5 blocks that are left"
    d = two_sessions()
    d.submit(3, prompt_of(55, start=200), session=3, now=3.0)
    bound(d, 1, seconds=95)
    d.submit(4, prompt_of(7, start=300), session=4, max_tokens=1)
    assert bound(d, 1) == [], "what becomes free is for the one that waits so long"


def test_past_the_deadline_of_the_queue_sessions_that_are_idle_for_a_moment_give_way() -> None:
    d = two_sessions(max_queue_seconds=20)
    d.submit(3, prompt_of(23, start=200), session=3)
    for turn in range(3):  # session 1 comes back every 5 seconds
        d.submit(10 + turn, prompt_of(23), session=1, max_tokens=1)
        assert bound(d, 1, seconds=5) == [10 + turn]
    assert bound(d, 1, seconds=6) == [3]


def test_past_the_deadline_a_session_that_is_never_idle_does_not_keep_others_out() -> None:
    d = Driver(num_blocks=16, policy=Policy(max_queue_seconds=20))
    ended: set[int] = set()
    for i in range(60):
        d.submit(100 + i, prompt_of(30), session=1, max_tokens=3)
        if i == 2:
            d.submit(1, prompt_of(40, start=500), session=2, max_tokens=1)
        plan = d.must_plan()
        ended |= {request_id for request_id, _ in finishes(d.commit(plan, *[5] * plan.num_samples))}
    assert 1 in ended


# --- refusals that may be asked again ---


def test_a_full_queue_says_when_by_the_pace_of_those_that_ended() -> None:
    d = Driver(max_queued=2, policy=ALONE)
    d.submit(9, prompt_of(2, start=900), max_tokens=40)
    for request_id in range(3):
        d.submit(request_id, prompt_of(2, start=10 * request_id), max_tokens=1)
        d.step(5, 5)
    for request_id in (10, 11):
        d.submit(request_id, prompt_of(2))
    assert d.submit(12, prompt_of(2)) is Refusal.QUEUE_FULL
    assert d.core.retry_after == pytest.approx(1)
    d.submit(13, prompt_of(2), now=11.0)
    assert d.core.retry_after == pytest.approx(11 / 4), "three have ended since second 0"
    d.run_out()
    for request_id in (20, 21):
        d.submit(request_id, prompt_of(2), now=5000.0)
    assert d.submit(22, prompt_of(2), now=5000.0) is Refusal.QUEUE_FULL
    assert d.core.retry_after == pytest.approx(1), "nothing was to do meanwhile"


def test_a_session_that_would_wait_too_long_is_refused_and_told_how_long() -> None:
    d = Driver(num_blocks=16, policy=Policy(max_queue_seconds=5))
    d.submit(1, prompt_of(23), session=1)
    d.must_plan()
    d.submit(2, prompt_of(23, start=100), session=2)
    for request_id, now in ((3, 20.0), (4, 24.0)):
        assert d.submit(request_id, prompt_of(23, start=100 * request_id), session=request_id, now=now) is None
    d.plan(26.0 - d.now)
    assert d.stats.sessions_waiting == 1, "session 3 has waited too long"
    assert d.submit(5, prompt_of(23, start=500), session=5, now=27.0) is Refusal.NO_ROOM
    assert d.core.retry_after == pytest.approx(2 * (27 - 20) / 2), "they wait since second 20, and one place was given"
    assert d.submit(6, [*prompt_of(23), 1], session=1, now=27.0) is None, "a resident session goes on"
    assert d.submit(7, prompt_of(3, start=400), now=27.0) is None, "it leaves nothing that could be kept"


def test_what_a_quiet_engine_gets_at_once_waits_for_nobody() -> None:
    d = Driver(num_blocks=64, policy=Policy(max_queue_seconds=5))
    for request_id in (1, 2):
        d.submit(request_id, prompt_of(6, start=100 * request_id), max_tokens=1)
        d.run_out()
    for request_id in range(3, 9):
        assert d.submit(request_id, prompt_of(6, start=100 * request_id), now=d.now + 1000) is None


def test_the_prompt_that_it_waits_to_compute_is_in_the_cache_once_another_has_computed_it() -> None:
    d = Driver(BatchLimits(max_rows=4, max_tokens=64, max_blocks=16, block_size=4), policy=ALONE)
    for request_id in (1, 2):
        d.submit(request_id, prompt_of(32), max_tokens=30)
    assert bound(d, 1) == [1], "of 16 blocks 7 are left, and 10 are wanted"
    assert bound(d, 1) == [2]


def test_a_model_that_was_wrong_is_not_held_against_a_request_for_ever() -> None:
    d = taught()
    assert d.submit(1, prompt_of(4), tps_floor=1000.0) is Refusal.FLOOR_OUT_OF_REACH
    assert d.submit(1, prompt_of(4), tps_floor=1000.0, now=d.now + 100) is None


def test_long_streams_do_not_make_the_promise_to_a_short_one_void() -> None:
    d = taught()
    assert d.submit(1, prompt_of(4), tps_floor=100.0) is None
    assert [d.submit(2 + i, prompt_of(60, start=100 * i)) for i in range(3)].count(Refusal.FLOOR) == 2


def streams(d: Driver, rows: int, steps: int) -> None:
    """So many streams decode; a step takes 50 ms × (1 − 2^(−tokens / 8)): 8 ms for two, 11 ms for three."""
    for i in range(rows):
        d.submit(100 * rows + i, prompt_of(1, start=10 * i), tps_floor=0.0)
    for _ in range(steps):
        plan = d.must_plan(0.01)
        d.commit(plan, *[5] * plan.num_samples, seconds=0.05 * (1 - 2 ** (-plan.num_tokens / 8)))
    for i in range(rows):
        d.core.abort(100 * rows + i)


def taught(policy: Policy = ALONE) -> Driver:
    d = Driver(num_blocks=64, policy=policy)
    for rows in (4, 1, 3, 2):
        streams(d, rows, 12)
    assert not d.core.has_work
    assert d.core.predict_seconds([4, 4], []) == pytest.approx(0.008, rel=0.1)
    return d


def test_a_floor_that_cannot_be_kept_is_refused() -> None:
    d = taught()
    assert d.submit(1, prompt_of(4), tps_floor=1000.0) is Refusal.FLOOR_OUT_OF_REACH
    assert d.core.check() is None and not d.core.has_work
    assert d.submit(1, prompt_of(4), tps_floor=100.0) is None


def test_a_promise_that_was_out_of_reach_from_the_start_shuts_nobody_out() -> None:
    d = Driver(num_blocks=64, policy=ALONE)
    assert d.submit(1, prompt_of(4), tps_floor=1e6) is None, "nothing is known yet"
    for rows in (4, 1, 3, 2):
        streams(d, rows, 12)
    assert d.submit(2, prompt_of(4), tps_floor=1e6) is Refusal.FLOOR_OUT_OF_REACH
    assert d.submit(2, prompt_of(4)) is None
    assert d.submit(3, prompt_of(4), tps_floor=80.0) is None, "three take 11 ms"
    assert d.submit(4, prompt_of(4)) is Refusal.FLOOR, "four take 15 ms"


def test_only_so_many_streams_count_as_there_are_rows() -> None:
    d = Driver(BatchLimits(max_rows=3, max_tokens=16, max_blocks=16, block_size=4), max_queued=16, policy=ALONE)
    for rows in (1, 3, 2):
        streams(d, rows, 12)
    for request_id in range(10):
        assert d.submit(request_id, prompt_of(4), tps_floor=80.0) is None, "never more than three at once"


def test_who_would_break_the_promise_to_another_is_refused() -> None:
    d = taught()
    assert d.submit(1, prompt_of(4), tps_floor=100.0) is None
    assert d.submit(2, prompt_of(4)) is None
    assert d.submit(3, prompt_of(4)) is Refusal.FLOOR
    d.core.abort(2)
    assert d.submit(3, prompt_of(4)) is None, "two are carried again"
    d.core.abort(1)
    for request_id in (4, 5, 6):
        assert d.submit(request_id, prompt_of(4)) is None, "nobody has a promise any more"


def test_the_floor_of_the_policy_refuses_only_if_it_is_a_promise() -> None:
    for promise, refusal in ((False, None), (True, Refusal.FLOOR_OUT_OF_REACH)):
        d = taught(Policy(tps_floor=1000.0, floor_is_promise=promise, footprints=False))
        assert d.submit(1, prompt_of(4)) is refusal
        assert d.submit(2, prompt_of(4), tps_floor=0.0) is None, "it wants none"


def test_before_anything_is_known_no_floor_refuses() -> None:
    assert Driver().submit(1, prompt_of(4), tps_floor=1e6) is None
