"""Agents that speak chat: their calls arrive, and each turn's prompt goes on where the last answer ended."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints.chat_agents import AIDER, Body, MiniSweAgent, OpenCode, QwenCode, Said
from tests.entrypoints.served import Served, events, serving
from tests.entrypoints.test_tool_calls import CHAT, qwen3, saying

LOOPS = (OpenCode(), QwenCode(), MiniSweAgent())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(template=qwen3(), max_model_len=16384) as it:
        yield it


def written(name: str, arguments: dict[str, Any]) -> str:
    """A call as the model of these tests writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


def answered(served: Served, body: Body) -> tuple[Said, str]:
    """The answer to a request, streamed or whole, put together, and its finish reason."""
    reply = served.post(CHAT, body)
    assert reply.status == 200, reply.text
    if not body.get("stream"):
        choice = reply.json()["choices"][0]
        message = choice["message"]
        calls = [(call["id"], *call["function"].values()) for call in message.get("tool_calls") or []]
        return Said(message["content"] or "", message.get("reasoning_content") or "", calls), choice["finish_reason"]
    said, reason = Said("", "", []), ""
    *told, done = events(reply.text)
    assert done == "[DONE]"
    assert (told[-1]["choices"] == []) == ("stream_options" in body), "usage comes for who asks for it"
    for event in told:
        for choice in event["choices"]:
            delta = choice["delta"]
            said.content += delta.get("content") or ""
            said.reasoning += delta.get("reasoning_content") or ""
            for part in delta.get("tool_calls") or []:
                if part["index"] == len(said.calls):
                    said.calls.append((part["id"], part["function"]["name"], ""))
                id, name, arguments = said.calls[part["index"]]
                said.calls[part["index"]] = (id, name, arguments + part["function"].get("arguments", ""))
            reason = choice["finish_reason"] or reason
    return said, reason


@pytest.mark.parametrize("agent", LOOPS, ids=lambda agent: type(agent).__name__)
def test_an_agent_works_in_a_loop_and_nothing_of_a_turn_is_computed_twice(
    served: Served, agent: OpenCode | QwenCode | MiniSweAgent, caplog: pytest.LogCaptureFixture
) -> None:
    run = ("bash", {"command": "python test.py && echo 'é \"x\"'"})
    turns = [
        (f"<think>\nLook first.\n</think>\n\nI look.\n{written(*run)}\n{written(*run)}", [run, run]),
        (written(*agent.edit), [agent.edit]),
        (f"<think>\nOnce more.\n</think>\n\n{written(*run)}", [run]),
        ("It passes.", []),
    ]
    body, before = agent.first(), []
    with caplog.at_level(logging.WARNING):
        for text, calls in turns:
            with saying(served, text):
                said, reason = answered(served, body)
            assert [(name, json.loads(arguments)) for _, name, arguments in said.calls] == calls
            assert len({id for id, *_ in said.calls}) == len(calls)
            assert reason == ("tool_calls" if calls else "stop")
            asked = served.engine.submitted[-1]["ids"]
            assert asked[: len(before)] == before
            before = [*asked, *text.encode()]
            if calls:
                body = agent.next(body, said, [f"result {index}\n" for index in range(len(calls))])
    assert said.content == "It passes."
    assert not caplog.records, "nothing that it sends is unknown, or had to be repaired"


def test_aider_streams_without_usage_and_asks_for_commit_messages_whole(served: Served) -> None:
    edit, commit = AIDER
    block = "a.py\n```python\n<<<<<<< SEARCH\nx = 1\n=======\nx = 2\n>>>>>>> REPLACE\n```\n"
    with saying(served, f"<think>\nHm.\n</think>\n\n{block}"):
        assert answered(served, edit) == (Said(block, "Hm.", []), "stop")
    with saying(served, "fix: x is 2"):
        assert answered(served, commit) == (Said("fix: x is 2", "", []), "stop")
