"""How agents that speak chat write their requests: opencode 1.18, qwen-code 0.24, mini-swe-agent 2.4, aider 0.86.

The shapes are recorded, the words are not theirs. Each agent sends a first request, and continues with the answer and
the results of its calls in the history, written as it writes them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]


@dataclass
class Said:
    """An answer as a client has put it together. A call is (id, name, arguments)."""

    content: str
    reasoning: str
    calls: list[tuple[str, str, str]]


def tool(name: str, description: str, schema: dict[str, Any] | None) -> dict[str, Any]:
    function = {"name": name, "description": description, **({} if schema is None else {"parameters": schema})}
    return {"type": "function", "function": function}


def texts(names: tuple[str, ...], **more: Any) -> dict[str, Any]:
    properties = {name: {"type": "string", "description": f"The {name}"} for name in names}
    return {"type": "object", "properties": {**properties, **more}, "required": list(names)}


TASK = "Tests fail. Mend the code."


class OpenCode:
    """Calls come back re-serialised; content beside them is a string, perhaps an empty one."""

    edit = ("edit", {"filePath": "/p/a.py", "oldString": "1", "newString": "2"})

    def first(self) -> Body:
        draft = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        timeout = {"type": "integer", "exclusiveMinimum": 0, "maximum": 9007199254740991}
        return {
            "model": "echo",
            "max_tokens": 2000,
            "tool_choice": "auto",
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [
                {"role": "system", "content": "You edit code.\n<env>\n  Working directory: /p\n</env>"},
                {"role": "user", "content": f'"{TASK}"'},
            ],
            "tools": [
                tool("bash", "Runs a command", draft | texts(("command",), timeout=timeout)),
                tool("edit", "Replaces text", draft | texts(("filePath", "oldString", "newString"))),
            ],
        }

    def next(self, body: Body, said: Said, results: list[str]) -> Body:
        calls = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": _compact(arguments)}}
            for id, name, arguments in said.calls
        ]
        turn: dict[str, Any] = {"role": "assistant", "content": said.content}
        if said.reasoning:
            turn["reasoning_content"] = said.reasoning
        answers = [
            {"role": "tool", "tool_call_id": id, "content": result}
            for (id, *_), result in zip(said.calls, results, strict=True)
        ]
        return body | {"messages": [*body["messages"], turn | {"tool_calls": calls}, *answers]}


class QwenCode:
    """Parts for users and tools, null beside calls, and tools that take no parameters say so by having none."""

    edit = ("edit", {"file_path": "/p/a.py", "old_string": "1", "new_string": "2"})

    def first(self) -> Body:
        background = {"type": "boolean"}
        limit = {"type": ["integer", "null"]}
        notes = [f"<system-reminder>\n{note}\n</system-reminder>" for note in ("Skills: none.", "In /p.")]
        return {
            "model": "echo",
            "max_tokens": 2000,
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [
                {"role": "system", "content": "You edit code."},
                {"role": "user", "content": [{"type": "text", "text": text} for text in (*notes, TASK)]},
            ],
            "tools": [
                tool("bash", "Runs a command", texts(("command",), is_background=background, limit=limit)),
                tool("edit", "Replaces text", texts(("file_path", "old_string", "new_string"))),
                tool("get_goal", "Tells the goal", None),
            ],
        }

    def next(self, body: Body, said: Said, results: list[str]) -> Body:
        calls = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": _compact(arguments)}}
            for id, name, arguments in said.calls
        ]
        turn: dict[str, Any] = {"role": "assistant", "content": said.content or None, "tool_calls": calls}
        if said.reasoning:
            turn["reasoning_content"] = said.reasoning
        answers = [
            {"role": "tool", "tool_call_id": id, "content": [{"type": "text", "text": result}]}
            for (id, *_), result in zip(said.calls, results, strict=True)
        ]
        return body | {"messages": [*body["messages"], turn, *answers]}


class MiniSweAgent:
    """Not streamed; a message without content has no such key; arguments come back as they were."""

    edit = ("bash", {"command": "sed -i 's|1|2|' a.py"})

    def first(self) -> Body:
        return {
            "model": "echo",
            "messages": [{"role": "system", "content": "You use a shell."}, {"role": "user", "content": TASK}],
            "tools": [tool("bash", "Runs a command", texts(("command",)))],
        }

    def next(self, body: Body, said: Said, results: list[str]) -> Body:
        turn: dict[str, Any] = {"content": said.content} if said.content else {}
        turn |= {
            "role": "assistant",
            "tool_calls": [
                {"function": {"arguments": arguments, "name": name}, "id": id, "type": "function"}
                for id, name, arguments in said.calls
            ],
        }
        if said.reasoning:
            turn["reasoning_content"] = said.reasoning
        answers = [
            {"content": json.dumps({"returncode": 0, "output": result}, indent=2), "tool_call_id": id, "role": "tool"}
            for (id, *_), result in zip(said.calls, results, strict=True)
        ]
        return body | {"messages": [*body["messages"], turn, *answers]}


AIDER: tuple[Body, Body] = (
    {
        "model": "echo",
        "stream": True,
        "temperature": 0,
        "messages": [
            {"role": "system", "content": "Answer with SEARCH/REPLACE blocks."},
            {"role": "user", "content": "a.py\n```python\nx = 1\n```"},
            {"role": "assistant", "content": "Ok."},
            {"role": "user", "content": TASK},
        ],
    },
    {
        "model": "echo",
        "temperature": 0,
        "messages": [
            {"role": "system", "content": "Write a commit message."},
            {"role": "user", "content": "\nUSER: Mend it.\n\nASSISTANT: Ok.\n"},
        ],
    },
)
"""Its request for an edit, with a made-up exchange in front, and the one for a commit message."""


def _compact(arguments: str) -> str:
    return json.dumps(json.loads(arguments), separators=(",", ":"), ensure_ascii=False)
