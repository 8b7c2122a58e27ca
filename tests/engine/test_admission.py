"""What a caller says about a request besides its tokens, and how the engine's refusals reach the caller."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tokenspeed._core import Refusal
from tokenspeed.engine.admission import Terms, as_error
from tokenspeed.engine.messages import Refused
from tokenspeed.errors import FloorNotKept, InvalidRequest, NoRoom, Overloaded, QueueFull


def terms(**changes: Any) -> Terms:
    return Terms.checked(**{"cache_salt": "", "priority": 0, "prompt_cache_key": "", "tps_floor": None, **changes})


def test_a_session_is_a_key_within_a_salt() -> None:
    words = ["", "a", "b", "ab", "ba", "ü"]
    named = {
        (salt, key): terms(cache_salt=salt, prompt_cache_key=key).session
        for salt, key in itertools.product(words, words[1:])
    }
    assert len(set(named.values())) == len(named)
    assert all(0 < session < 2**63 for session in named.values())
    assert terms(cache_salt="a", prompt_cache_key="b").session == named["a", "b"]


def test_without_a_key_there_is_no_session_whatever_the_salt() -> None:
    assert [terms(cache_salt=salt).session for salt in ("", "a", "b")] == [0, 0, 0]


def test_no_floor_and_the_engines_floor_are_different_things() -> None:
    assert [terms(tps_floor=floor).tps_floor for floor in (None, 0, 70, 12.5)] == [None, 0.0, 70.0, 12.5]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tps_floor", -1),
        ("tps_floor", float("nan")),
        ("tps_floor", float("inf")),
        ("tps_floor", True),
        ("tps_floor", "70"),
        ("priority", 2**31),
        ("cache_salt", "\ud800"),
        ("prompt_cache_key", "\ud800"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as refused:
        terms(**{field: value})
    assert refused.value.param == field


@pytest.mark.parametrize("reason", list(Refusal))
def test_what_may_pass_is_a_429_with_a_retry_time_and_all_else_a_400(reason: Refusal) -> None:
    error = as_error(Refused(id=1, reason=reason.name, retry_after=9))
    kinds = {Refusal.QUEUE_FULL: QueueFull, Refusal.FLOOR: FloorNotKept, Refusal.NO_ROOM: NoRoom}
    assert type(error) is kinds.get(reason, InvalidRequest)
    assert isinstance(error, Overloaded) is reason.can_retry
    if reason.can_retry:
        assert (error.status, error.retry_after, error.code) == (429, 9, reason.name.lower())
    else:
        assert (error.status, error.retry_after) == (400, None)


def test_a_refusal_that_no_wait_could_change_names_the_field_at_fault() -> None:
    out_of_reach = as_error(Refused(id=1, reason="FLOOR_OUT_OF_REACH"))
    assert out_of_reach.param == "tps_floor" and "tps_floor" in out_of_reach.message
    malformed = as_error(Refused(id=1, reason="INVALID", detail="no room", param="min_tokens"))
    assert malformed.param == "min_tokens" and "no room" in malformed.message
