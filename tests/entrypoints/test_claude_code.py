"""Claude Code's own traffic: the second turn repeats the first one's prompt and answer, whatever else changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints.claude_code import REMINDER, first_turn, second_turn
from tests.entrypoints.messages_api import COUNT, MESSAGES, assembled, told
from tests.entrypoints.served import Served, serving
from tests.entrypoints.test_tool_calls import qwen3, saying
from tests.text.templates import MISTRAL, TOKENS
from tokenspeed.text.template import ChatTemplate

CALLED = '<tool_call>\n{"name": "Bash", "arguments": {"command": "wc -l README.md", "timeout": 5}}\n</tool_call>'
COMPACT = CALLED.replace('{"command": "wc -l README.md", "timeout": 5}', '{"command":"wc -l README.md","timeout":5}')
SAID = "I count them.\n"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(template=qwen3(), max_model_len=8192) as it:
        yield it


def answered(served: Served, body: dict[str, Any]) -> tuple[list[int], dict[str, Any]]:
    """The prompt's ids and the message."""
    reply = served.post(MESSAGES + "?beta=true", body, anthropic_version="2023-06-01", anthropic_beta="claude-code-1")
    assert reply.status == 200, reply.text
    return served.engine.submitted[-1]["ids"], assembled(told(reply.text))


@pytest.mark.parametrize("said", ["It has 17 lines.", SAID + CALLED, CALLED, COMPACT, SAID + CALLED + "\n" + CALLED])
def test_the_second_turn_begins_with_the_first_and_its_answer(served: Served, said: str) -> None:
    with saying(served, said):
        first, message = answered(served, first_turn())
        second, _ = answered(served, second_turn(message["content"]))
    assert message["stop_reason"] == ("tool_use" if "<tool_call>" in said else "end_turn")
    whole = bytes(first) + said.encode()
    assert bytes(second).startswith(whole), bytes(second)[-500:].decode()


def test_thinking_comes_back_as_the_template_writes_it_in_the_turn_of_a_tool(served: Served) -> None:
    with saying(served, f"<think>\nCount.\n</think>\n\n{SAID}{CALLED}"):
        first, message = answered(served, first_turn())
        second, _ = answered(served, second_turn(message["content"]))
    assert bytes(second).startswith(bytes(first) + f"<think>\nCount.\n</think>\n\n{SAID}{CALLED}".encode())


def test_the_session_is_named_and_nothing_is_told_as_unknown(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING"):
        answered(served, first_turn())
    assert served.engine.submitted[-1]["key"] == "5e551017"
    assert not caplog.records


def test_counting_gives_what_the_turn_will_cost(served: Served) -> None:
    ids, _ = answered(served, first_turn())
    body = {key: value for key, value in first_turn().items() if key not in ("max_tokens", "stream", "metadata")}
    assert served.post(COUNT + "?beta=true", body).json() == {"input_tokens": len(ids)}


def test_a_template_that_takes_no_later_system_message_serves_it_all_the_same() -> None:
    template = ChatTemplate(MISTRAL, special_tokens=TOKENS, name="mistral")
    with serving(template=template, tool_call_parser="hermes", max_model_len=8192) as served:
        first, message = answered(served, first_turn(max_tokens=20))
        second, _ = answered(served, second_turn(message["content"]))
        assert REMINDER.encode() in bytes(first)
        assert bytes(second).count(REMINDER.encode()) == 1
