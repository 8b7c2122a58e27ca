"""What the tests of Anthropic's routes share: bodies, events, errors."""

from __future__ import annotations

import json
from typing import Any

from tests.entrypoints.served import Reply

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
USER: dict[str, Any] = {"role": "user", "content": "hello"}


def message(**fields: Any) -> dict[str, Any]:
    """A valid body, changed by `fields`; a field that is `...` is left out."""
    body = {"model": "echo", "max_tokens": 8, "messages": [USER], **fields}
    return {key: value for key, value in body.items() if value is not ...}


def problem(reply: Reply) -> dict[str, Any]:
    """The error object of an answer in Anthropic's error shape."""
    body = reply.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error", body
    assert set(body["error"]) == {"type", "message"} and body["error"]["message"], body
    assert body["request_id"] and body["request_id"] == reply.headers["request-id"], reply
    return dict(body["error"])


def told(text: str) -> list[dict[str, Any]]:
    """The data of named events, whose names must be their types; comments are left out."""
    data: list[dict[str, Any]] = []
    for block in text.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name, line = block.split("\n")
        data.append(json.loads(line.removeprefix("data: ")))
        assert name == f"event: {data[-1]['type']}", block
    return data


def assembled(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream tells, whose events must come in the order that clients rely on."""
    assert [event["type"] for event in events[:2]] == ["message_start", "ping"]
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    whole: dict[str, Any] = events[0]["message"]
    assert whole["content"] == [] and whole["stop_reason"] is None
    is_open = False
    for event in events[2:-2]:
        match event["type"]:
            case "content_block_start":
                assert not is_open and event["index"] == len(whole["content"])
                whole["content"].append(event["content_block"])
                is_open = True
                if event["content_block"]["type"] == "tool_use":
                    assert event["content_block"]["input"] == {}
                    event["content_block"]["input"] = ""
            case "content_block_delta":
                assert is_open and event["index"] == len(whole["content"]) - 1
                _add(whole["content"][-1], event["delta"])
            case "content_block_stop":
                assert is_open and event["index"] == len(whole["content"]) - 1
                is_open = False
            case other:
                assert other == "ping"
    assert not is_open
    for block in whole["content"]:
        if block["type"] == "tool_use":
            block["input"] = json.loads(block["input"])
    assert whole["usage"]["output_tokens"] <= events[-2]["usage"]["output_tokens"]
    return {**whole, **events[-2]["delta"], "usage": events[-2]["usage"]}


def _add(block: dict[str, Any], delta: dict[str, Any]) -> None:
    kind, field = next((key, value) for key, value in delta.items() if key != "type")
    expected = {"text": "text_delta", "thinking": "thinking_delta", "partial_json": "input_json_delta"}
    if kind == "signature":
        assert delta["type"] == "signature_delta" and block["type"] == "thinking" and not block["signature"]
        block["signature"] = field
    else:
        assert delta["type"] == expected[kind] and field
        block["input" if kind == "partial_json" else kind] += field
