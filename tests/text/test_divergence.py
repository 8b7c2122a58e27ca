"""What two turns of a conversation do not share, and why."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from tokenspeed.text.divergence import (
    ANSWER,
    CHANGED,
    FEWER,
    FIRST,
    RENDERED,
    SETTINGS,
    TOOLS,
    WHOLE,
    Explanation,
    Fingerprint,
    Turns,
    message_after,
)

Message = dict[str, Any]
SYSTEM, ASKED, SAID, AGAIN = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "Go on"},
)
CHAT = [SYSTEM, ASKED]
TOOL = {"type": "function", "function": {"name": "f"}}


def packed(*ids: int) -> array[int]:
    return array("i", ids)


def marked(messages: list[Message], tools: Any = None, settings: dict[str, Any] | None = None) -> Fingerprint:
    return Fingerprint.of(messages, tools, settings or {})


def explained(
    ids: list[int], messages: list[Message], tools: Any = None, settings: dict[str, Any] | None = None
) -> Explanation:
    """What is said of a turn after one with ids 0 to 9 that was answered with 10, 11 and 12."""
    turns = Turns()
    turns.note("a", "", packed(*range(10)), marked(CHAT), [10, 11, 12])
    return turns.explain("a", "", ids, marked(messages, tools, settings), lambda shared: shared)


GROWN = [*CHAT, SAID, AGAIN]


@pytest.mark.parametrize(
    ("ids", "messages", "expected"),
    [
        (list(range(20)), GROWN, Explanation(13, 13, WHOLE)),
        ([*range(12), 99], GROWN, Explanation(12, 13, WHOLE)),
        ([*range(11), 99], GROWN, Explanation(11, 13, ANSWER, 2)),
        ([*range(1), 99], GROWN, Explanation(1, 13, RENDERED, 1)),
        ([*range(9), 99], GROWN, Explanation(9, 13, ANSWER, 9)),
        ([*range(4), 99], [SYSTEM, AGAIN, SAID, AGAIN], Explanation(4, 13, CHANGED, 1)),
        ([99], [AGAIN, ASKED, SAID, AGAIN], Explanation(0, 13, CHANGED, 0)),
        ([*range(4), 99], [SYSTEM], Explanation(4, 13, FEWER, 1)),
        ([*range(4), 99], [AGAIN, SAID], Explanation(4, 13, FIRST)),
    ],
)
def test_the_first_difference_is_told_with_its_reason(
    ids: list[int], messages: list[Message], expected: Explanation
) -> None:
    assert explained(ids, messages) == expected


def test_tools_and_settings_are_told_before_messages() -> None:
    assert explained([0, 99], GROWN, [TOOL]).reason == TOOLS
    assert explained([0, 99], GROWN, None, {"enable_thinking": False}).reason == SETTINGS


def test_a_named_session_is_compared_with_its_own_last_turn() -> None:
    turns = Turns()
    turns.note("a", "s", packed(0, 1, 2), marked(CHAT), [])
    turns.note("a", "other", packed(0, 1, 2, 3, 4, 5), marked(CHAT), [])
    turns.note("a", "s", packed(0, 1, 7), marked(CHAT), [8])
    ids = [0, 1, 2, 3, 4]
    assert turns.explain("a", "s", ids, marked(GROWN), lambda _: 0) == Explanation(2, 4, RENDERED, 0)
    assert turns.explain("a", "", ids, marked(GROWN), lambda _: 0).shared == 5
    assert turns.explain("a", "new", ids, marked(GROWN), lambda _: 0) == Explanation(0, 0, FIRST)


def test_an_answer_counts_with_what_was_generated_after_the_turn_began() -> None:
    turns = Turns()
    answer: list[int] = []
    turns.note("a", "", packed(0, 1), marked(CHAT), answer)
    answer += [2, 3]
    assert turns.explain("a", "", [0, 1, 2, 3, 4], marked(GROWN), lambda _: 0) == Explanation(4, 4, WHOLE)


def test_one_tenant_never_hears_of_another() -> None:
    turns = Turns()
    turns.note("a", "s", packed(0, 1, 2), marked(CHAT), [])
    for session in ("", "s"):
        assert turns.explain("b", session, [0, 1, 2, 3], marked(GROWN), lambda _: 0) == Explanation(0, 0, FIRST)


def test_turns_are_forgotten_by_number_and_by_tokens() -> None:
    for turns in (Turns(max_turns=2), Turns(max_tokens=7)):
        for session in "xyz":
            turns.note("a", session, packed(0, 1, 2), marked(CHAT), [])
        found = [turns.explain("a", session, [0, 1, 2], marked(CHAT), lambda _: 0).previous for session in "xyz"]
        assert found == [0, 3, 3]


def test_the_message_behind_a_text_is_the_first_that_is_not_in_it() -> None:
    call = {"function": {"name": "look", "arguments": {}}}
    messages = [SYSTEM, ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}, AGAIN]
    whole = "<s>Be brief.<u>Hello<a>look {}<u>Go on"
    assert [message_after(messages, whole[:size]) for size in (0, 8, 12, 20, 26, len(whole) - 1, len(whole))] == [
        0, 0, 1, 2, 2, 3, None,
    ]  # fmt: skip
