"""Calls that a client sends back are in the prompt as the model wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints.served import Served, chat, events, serving
from tests.text.parsers.cases import TOOLS
from tests.text.templates import QWEN3, TOKENS
from tokenspeed.text.template import ChatTemplate

CHAT = "/v1/chat/completions"
OFFERED = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in TOOLS.items()]
ARGUMENTS = '{"city":"Par\\u00eds",  "days":3}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    template = ChatTemplate(QWEN3, special_tokens=TOKENS, name="qwen3")
    with serving(template=template, max_model_len=8192) as it:
        it.call(lambda: setattr(it.engine, "script", list(CALL.encode())))
        yield it


def call_of(served: Served, stream: bool) -> dict[str, Any]:
    """The call that the model makes, as a client puts it together."""
    answer = served.post(CHAT, chat(tools=OFFERED, max_tokens=1000, stream=stream))
    if not stream:
        made: dict[str, Any] = answer.json()["choices"][0]["message"]["tool_calls"][0]
        return made
    deltas = [event["choices"][0]["delta"] for event in events(answer.text) if isinstance(event, dict)]
    parts = [part for delta in deltas for part in delta.get("tool_calls", [])]
    text = "".join(part["function"]["arguments"] for part in parts)
    return {**parts[0], "function": {**parts[0]["function"], "arguments": text}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("indent", [None, 2])
def test_arguments_written_anew_are_those_of_the_model(served: Served, stream: bool, indent: int | None) -> None:
    made = call_of(served, stream)
    assert made["function"]["arguments"] == ARGUMENTS
    made["function"]["arguments"] = json.dumps(json.loads(ARGUMENTS), indent=indent)
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": made["id"], "content": "rain"},
    ]
    served.post(CHAT, chat(messages=messages, tools=OFFERED, max_tokens=1))
    prompt = bytes(served.call(lambda: served.engine.submitted[-1]["ids"])).decode()
    assert CALL in prompt
    counted = served.post("/tokenize", {"model": "echo", "messages": messages, "tools": OFFERED})
    assert bytes(counted.json()["tokens"]).decode() == prompt


def test_a_call_that_the_model_never_made_is_written_as_templates_do(served: Served) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "tool_calls": [call]}]
    served.post(CHAT, chat(messages=messages, tools=OFFERED, max_tokens=1))
    prompt = bytes(served.call(lambda: served.engine.submitted[-1]["ids"])).decode()
    assert '{"city": "París", "days": 3}' in prompt


def test_metrics_say_where_the_tokens_of_prompts_came_from(served: Served) -> None:
    text = served.get("/metrics").text
    assert "tokenspeed:prompt_memory_bytes 1000.0" in text
    for source, count in (("encoded", 30), ("known", 50), ("generated", 20)):
        assert f'tokenspeed:chat_prompt_tokens_total{{source="{source}"}} {count}.0' in text
