"""Two turns as Claude Code sends them, in words of our own: what changes between them changes as it does there."""

from __future__ import annotations

import json
from typing import Any

MARK = {"cache_control": {"type": "ephemeral"}}
REMINDER = "<system-reminder>\nThe folder has a README.md.\n</system-reminder>"
ASKED = "How many lines has README.md?"

TOOLS: list[dict[str, Any]] = [
    {
        "name": "Bash",
        "description": "Runs a command.",
        "input_schema": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "object",
            "properties": {
                "command": {"type": "string", "description": "What to run"},
                "timeout": {"type": "number", "maximum": 600000},
            },
            "required": ["command"],
            "additionalProperties": False,
        },
    },
    {
        "name": "NotebookEdit",
        "description": "Edits a notebook.",
        "defer_loading": True,
        "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}},
    },
]


def _body(header: str, messages: list[Any], model: str, max_tokens: int) -> dict[str, Any]:
    user_id = json.dumps({"device_id": "d0", "account_uuid": "", "session_id": "5e551017"})
    return {
        "model": model,
        "max_tokens": max_tokens,
        "stream": True,
        "system": [
            {"type": "text", "text": f"x-anthropic-billing-header: cc_version=2.1.331.{header}; cch={header};"},
            {"type": "text", "text": "You help with the code of this folder.", **MARK},
            {"type": "text", "text": "\nYou run commands and say what you found. " * 12, **MARK},
        ],
        "messages": messages,
        "tools": TOOLS,
        "metadata": {"user_id": user_id},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
    }


def first_turn(model: str = "echo", max_tokens: int = 32_000) -> dict[str, Any]:
    """The reminder is a list of blocks, and the last block is marked."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": ASKED, **MARK}]},
        {"role": "system", "content": [{"type": "text", "text": REMINDER, **MARK}]},
    ]
    return _body("a1b", messages, model, max_tokens)


def second_turn(content: list[Any], model: str = "echo", max_tokens: int = 32_000) -> dict[str, Any]:
    """`content` is what the first turn answered. The reminder is a string now, and the mark has moved."""
    calls = [block for block in content if block["type"] == "tool_use"]
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": call["id"], "content": "17 README.md", "is_error": False}
        for call in calls
    ]
    last: list[Any] = results or [{"type": "text", "text": "And now?"}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": ASKED}]},
        {"role": "system", "content": REMINDER},
        {"role": "assistant", "content": content},
        {"role": "user", "content": [*last[:-1], {**last[-1], **MARK}]},
    ]
    return _body("9f0", messages, model, max_tokens)
