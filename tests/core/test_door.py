"""The door of the control plane: what makes no sense is `Misuse` for that call alone, and changes nothing."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.core.driver import LIMITS, Driver, int32, prompt_of
from tokenspeed._core import Misuse, Policy, Refusal, Scheduler
from tokenspeed._core.scheduler import PromptHashes, block_hashes, siphash
from tokenspeed.batch import BatchLimits, PlanBuffers

HUGE = 10**5000  # too long to be printed
HUGELY = pytest.param(HUGE, id="huge")
NO_IDS = int32([])


def busy() -> Driver:
    """A scheduler with a step in flight: one request decodes, another has its prompt computed."""
    d = Driver()
    d.submit(1, prompt_of(5))
    d.step(9)
    d.submit(2, prompt_of(6, start=50))
    d.must_plan()
    return d


def refused(d: Driver, *calls: Callable[[], object]) -> None:
    """Each call is `Misuse`, and the state is what it was."""
    before = (d.core.dump(), d.core.retry_after)
    for call in calls:
        with pytest.raises(Misuse):
            call()
        assert (d.core.dump(), d.core.retry_after) == before and d.core.check() is None


# --- arguments ---


@pytest.mark.parametrize("when", [math.inf, -math.inf, math.nan, -1.0, 2.0**33 + 1, 1e308, HUGELY, "now", None, True])
def test_a_time_that_cannot_be_moves_no_clock(when: Any) -> None:
    d = busy()
    refused(d, lambda: d.core.plan(when, d.buffers[1]), lambda: d.submit(3, [1], now=when))
    assert d.plan(1e-6) is not None, "the clock goes on from where it was"


def test_a_plan_cannot_go_back_in_time_and_the_next_one_goes_on() -> None:
    d = Driver()
    d.submit(1, prompt_of(3))
    d.step(9)
    refused(d, lambda: d.core.plan(d.now - 0.5, d.buffers[0]))
    assert d.plan(0.0) is not None


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0, -1e-300, 1e308, HUGELY, "1", None, True])
def test_a_step_cannot_have_taken_what_is_no_duration(seconds: Any) -> None:
    d = busy()
    one = int32([9, 9]).reshape(2, 1)
    refused(d, lambda: d.core.commit(2, one, int32([1, 1]), seconds))
    d.core.commit(2, one, int32([1, 1]), 0.01)


def test_steps_faster_than_a_microsecond_count_as_one() -> None:
    predicted = []
    for seconds in (5e-324, 1e-300, 1e-6):
        d = Driver(max_model_len=64)
        for number in range(20):
            d.submit(number, prompt_of(4), max_tokens=3)
            while d.core.has_work:
                plan = d.must_plan()
                d.commit(plan, *[5] * plan.num_samples, seconds=seconds)
        predicted.append(d.core.predict_seconds([10], []))
    assert predicted[0] == predicted[1] == predicted[2] == pytest.approx(1e-6)


@pytest.mark.parametrize(
    "array",
    [
        None, 5, "12", [1, 2], b"1234", np.zeros(2), np.zeros(2, np.int64), np.zeros((1, 2), np.int32),
        np.zeros(8, np.int32)[::2], np.array(["a"]), np.array([None]),
    ],
)  # fmt: skip
def test_what_is_no_int32_vector_is_not_taken_for_one(array: Any) -> None:
    d = busy()
    one = int32([9, 9]).reshape(2, 1)
    refused(
        d,
        lambda: d.core.submit(3, array, now=0.0, max_tokens=1, stop_ids=NO_IDS),
        lambda: d.core.submit(3, int32([1]), now=0.0, max_tokens=1, stop_ids=array),
        lambda: d.core.commit(2, array, int32([1, 1])),
        lambda: d.core.commit(2, one, array),
        lambda: d.core.land_copies(array, NO_IDS),
        lambda: d.core.land_copies(NO_IDS, array),
        lambda: block_hashes(b"k" * 16, b"", array, 4),
    )


@pytest.mark.parametrize("request_id", [2**63, -(2**63) - 1, HUGELY, 1.0, "1", None, True, np.True_, int32([1])])
def test_an_id_is_an_integer_of_64_bits(request_id: Any) -> None:
    d = busy()
    refused(
        d,
        lambda: d.submit(request_id, [1]),
        lambda: d.core.abort(request_id),
        lambda: d.core.finish(request_id, 0),
        lambda: d.core.holds(request_id),
        lambda: d.core.tokens_of(request_id),
        lambda: d.core.cached_tokens(request_id),
        lambda: d.core.commit(request_id, int32([9, 9]).reshape(2, 1), int32([1, 1])),
    )
    for right in (2**63 - 1, -(2**63), np.int64(5), np.uint8(6)):
        assert d.submit(right, [1]) is None and d.core.holds(int(right)) and d.core.abort(right)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("priority", 2**31), ("priority", -(2**31) - 1), ("priority", 1.0), ("priority", None),
        ("session", 2**63), ("session", -1), ("session", True),
        ("tps_floor", math.nan), ("tps_floor", math.inf), ("tps_floor", -1), ("tps_floor", "70"),
        pytest.param("tps_floor", HUGE, id="huge tps_floor"), pytest.param("max_tokens", -HUGE, id="huge max_tokens"),
        ("salt", "text"), ("salt", None), ("salt", bytearray(b"a")),
        ("reuse_prefix", 1), ("reuse_prefix", None), ("reuse_prefix", np.zeros(2)),
        ("max_tokens", 0), ("max_tokens", 1.5),
        ("min_tokens", -1), ("min_tokens", None),
    ],
)  # fmt: skip
def test_a_wish_that_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    d = busy()
    refused(d, lambda: d.submit(3, [1], **{name: value}))
    with pytest.raises(Misuse, match=name):
        d.submit(3, [1], **{name: value})


def test_a_finish_is_checked_whether_or_not_the_request_is_known() -> None:
    d = busy()
    for request_id in (1, 99):
        for count in (-1, 1.0, None, True):
            refused(d, lambda: d.core.finish(request_id, count))  # type: ignore[arg-type]  # noqa: B023
    refused(d, lambda: d.core.finish(1, HUGE))
    assert d.core.finish(99, HUGE) is False


def test_a_prediction_is_of_counts() -> None:
    d = busy()
    for tokens in (0, -1, 2**25, HUGE, 1.0, None, True):
        refused(d, lambda: d.core.seconds_of_prompt(tokens))  # type: ignore[arg-type]  # noqa: B023
    calls: list[tuple[Any, Any]] = [
        ([-1], []), ([1.5], []), ([HUGE], []), (None, []), ([], [1]), ([], [(1,)]), ([], [(1, -1)]), ([], [(0, 2**25)]),
    ]  # fmt: skip
    refused(d, *[lambda pair=pair: d.core.predict_seconds(*pair) for pair in calls])


def test_hashes_are_of_bytes_under_a_key_of_16() -> None:
    key = b"k" * 16
    calls: list[Callable[[Any], object]] = [
        lambda wrong: siphash(wrong, b""),
        lambda wrong: siphash(key, wrong),
        lambda wrong: block_hashes(wrong, b"", NO_IDS, 4),
        lambda wrong: block_hashes(key, wrong, NO_IDS, 4),
        lambda wrong: block_hashes(key, b"", NO_IDS, wrong),
    ]
    for call in calls:
        for wrong in (None, "k" * 16, bytearray(16), np.zeros(16, np.uint8)):
            with pytest.raises(Misuse):
                call(wrong)


# --- buffers ---


def test_buffers_that_are_smaller_than_they_say_are_never_written() -> None:
    d = busy()
    names = ["row_slot", "row_new", "row_computed", "token_ids", "table_delta", "sample_rows", "bound", "copies"]
    for name in [*names, "released", "bound_ids"]:
        whole = getattr(PlanBuffers(LIMITS), name)
        read_only = whole.copy()
        read_only.flags.writeable = False
        for wrong in (whole[:-1], whole.astype(np.float32), whole.astype(np.int16), read_only, whole.tolist(), None):
            buffers = PlanBuffers(LIMITS)
            setattr(buffers, name, wrong)
            with pytest.raises(Misuse, match=name):
                d.core.plan(d.now, buffers)
    for other in (None, 5, LIMITS, PlanBuffers(replace(LIMITS, max_rows=5))):
        refused(d, lambda: d.core.plan(d.now, other))  # type: ignore[arg-type]  # noqa: B023


# --- sizes ---


@pytest.mark.parametrize("value", [0, -1, -(2**31), 2**24 + 1, 2**31 - 1, 2**31, 2**63, HUGELY, 1.0, "8", None, True])
@pytest.mark.parametrize(
    "name", ["num_blocks", "max_model_len", "max_queued", "max_rows", "max_tokens", "max_blocks", "block_size"]
)
def test_a_size_that_cannot_be_is_refused_by_name_and_nothing_is_reserved(name: str, value: Any) -> None:
    with pytest.raises(Misuse, match=name):
        if name in vars(LIMITS):
            Driver(replace(LIMITS, **{name: value}))
        else:
            Driver(**{name: value})


def test_the_longest_queue_is_long() -> None:
    assert Driver(max_queued=1_000_000).submit(1, prompt_of(3)) is None


def test_a_second_tier_needs_copies() -> None:
    limits = replace(LIMITS, max_copies=0)
    with pytest.raises(Misuse, match="max_copies"):
        Driver(limits, num_host_blocks=8)
    d = Driver(limits)
    d.submit(1, prompt_of(3), max_tokens=2)
    d.run_out()


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_host_blocks": -1}, {"num_host_blocks": 2**24 + 1}, {"prefix_caching": None}, {"prefix_caching": 1},
        {"policy": None}, {"policy": Policy(tps_floor=math.nan)}, {"policy": Policy(tps_floor=HUGE)},
        {"policy": Policy(max_queue_seconds=-1)}, {"policy": Policy(footprints=None)},  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_what_else_a_scheduler_cannot_be_made_of(sizes: dict[str, Any]) -> None:
    with pytest.raises(Misuse):
        Driver(**sizes)


@pytest.mark.parametrize("limits", [None, 5, (4, 16, 16, 4), BatchLimits(8, 4, 4, 4)])
def test_limits_are_batch_limits_with_a_token_for_each_row(limits: Any) -> None:
    with pytest.raises(Misuse):
        Driver(limits)


@pytest.mark.parametrize("key", [None, b"short", "k" * 16, bytearray(16)])
def test_a_hash_key_has_16_bytes(key: Any) -> None:
    with pytest.raises(Misuse, match="hash key"):
        Scheduler(num_blocks=4, limits=LIMITS, max_model_len=8, max_queued=1, prefix_caching=True, hash_key=key)


# --- ids ---


def test_an_id_can_be_used_again_once_nothing_of_it_is_held() -> None:
    d = Driver()
    d.submit(1, prompt_of(4), stop=[8])
    first, second = d.must_plan(), d.must_plan()
    assert d.submit(1, [1]) is Refusal.DUPLICATE_ID
    d.commit(first, 8)
    assert d.core.holds(1) and d.submit(1, [1]) is Refusal.DUPLICATE_ID, "it has ended, but a step may still touch it"
    d.commit(second, 3)
    assert not d.core.holds(1) and d.submit(1, [1]) is None


# --- threads ---


def test_no_call_looks_in_while_another_thread_is_inside() -> None:
    limits = BatchLimits(max_rows=4, max_tokens=64, max_blocks=1 << 16, block_size=64)
    d = Driver(limits, num_blocks=1 << 17, max_model_len=1 << 23)
    unknown = PromptHashes(bytes(16), b"", NO_IDS, 64)
    calls: dict[str, Callable[[], object]] = {
        "submit": lambda: d.submit(9, [1]),
        "abort": lambda: d.core.abort(9),
        "finish": lambda: d.core.finish(9, 0),
        "plan": lambda: d.core.plan(1.0, d.buffers[0]),
        "commit": lambda: d.core.commit(1, int32([9]).reshape(1, 1), int32([1])),
        "land_copies": lambda: d.core.land_copies(NO_IDS, NO_IDS),
        "drop_cached": d.core.drop_cached,
        "open_cache_log": d.core.open_cache_log,
        "take_cache_events": d.core.take_cache_events,
        "retry_after": lambda: d.core.retry_after,
        "tokens_of": lambda: d.core.tokens_of(1),
        "cached_tokens": lambda: d.core.cached_tokens(1),
        "familiarity": lambda: d.core.familiarity(unknown),
        "stats": d.core.stats,
        "check": d.core.check,
        "dump": d.core.dump,
        "holds": lambda: d.core.holds(1),
        "num_unfinished": lambda: d.core.num_unfinished,
        "has_work": lambda: d.core.has_work,
        "seconds_of_prompt": lambda: d.core.seconds_of_prompt(1),
        "predict_seconds": lambda: d.core.predict_seconds([1], []),
        "max_length": lambda: d.core.max_length,
    }
    public = {name for name in vars(Scheduler) if not name.startswith("_")}
    assert set(calls) == public
    prompt = np.zeros(1 << 21, np.int32)  # it takes some 10 ms to hash, without the GIL
    kept_out: set[str] = set()

    def submit_a_long_one() -> None:
        while is_kept_out(lambda: d.core.submit(100, prompt, now=0.0, max_tokens=1, stop_ids=NO_IDS)):
            pass

    for _ in range(100):
        thread = threading.Thread(target=submit_a_long_one)
        thread.start()
        while thread.is_alive():
            kept_out |= {name for name in public - kept_out if is_kept_out(calls[name])}
        thread.join()
        d.core.abort(100)
        d.core.abort(9)
        if kept_out == public:
            return
    raise AssertionError(f"some were never kept out: {public - kept_out}")


def is_kept_out(call: Callable[[], object]) -> bool:
    try:
        call()
    except Misuse as error:
        return "another thread" in str(error)
    return False
