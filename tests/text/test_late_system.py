"""System messages in the midst, for templates that have no place for them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.text.templates import ALL, TOKENS
from tokenspeed.text.late_system import takes_late_system, without_late_system
from tokenspeed.text.template import ChatTemplate


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
RESULT = {"role": "tool", "content": "r", "tool_call_id": "1"}
ANSWER = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("name", "takes"),
    [("qwen3", True), ("llama3", True), ("mistral", False), ("deepseek", False)],
)
def test_what_a_template_does_with_them_is_found_by_trying(name: str, takes: bool) -> None:
    assert takes_late_system(ChatTemplate(ALL[name], special_tokens=TOKENS, name=name)) is takes


def test_a_template_that_drops_them_does_not_take_them() -> None:
    source = "{% for m in messages %}{% if m.role != 'system' or loop.first %}{{ m.content }}{% endif %}{% endfor %}"
    assert not takes_late_system(ChatTemplate(source, name="drops"))


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([system("a"), user("u")], [system("a"), user("u")]),
        ([system("a"), system("b"), user("u")], [system("a\n\nb"), user("u")]),
        ([user("u"), system("s")], [user("u\n\ns")]),
        ([user("u"), system("s"), user("v"), ANSWER], [user("u\n\ns\n\nv"), ANSWER]),
        ([user("u"), ANSWER, system("s"), user("v")], [user("u"), ANSWER, user("s\n\nv")]),
        ([user("u"), CALL, RESULT, system("s"), ANSWER], [user("u"), CALL, RESULT, user("s"), ANSWER]),
        ([user("u"), user("v"), ANSWER, user("w")], [user("u"), user("v"), ANSWER, user("w")]),
        ([user(""), system("s")], [user("s")]),
    ],
)
def test_they_become_the_text_of_the_user_beside_them(messages: list[Any], expected: list[Any]) -> None:
    before = [dict(message) for message in messages]
    assert without_late_system(messages) == expected
    assert messages == before


def test_more_turns_leave_earlier_ones_as_they_were() -> None:
    talk = [system("a"), user("u"), system("s"), ANSWER, user("v"), system("t"), CALL, RESULT, system("w"), ANSWER]
    for length in range(1, len(talk)):
        if talk[length]["role"] == "assistant":
            begun = without_late_system(talk[:length])
            assert without_late_system(talk)[: len(begun)] == begun
