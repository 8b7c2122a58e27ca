"""What Codex CLI sends, in our own words: the base prompt as a developer message, items with ids that the client made,
the whole history again in every turn.
"""

from __future__ import annotations

from typing import Any

FUNCTION = {
    "type": "function",
    "name": "shell",
    "description": "Runs a command and gives its output.",
    "strict": False,
    "parameters": {
        "type": "object",
        "properties": {
            "command": {"type": "array", "items": {"type": "string"}, "description": "the words of the command"},
            "workdir": {"type": ["string", "null"]},
            "timeout_ms": {"type": "number", "minimum": 0},
        },
        "required": ["command"],
        "additionalProperties": False,
    },
}
TOOLS: list[dict[str, Any]] = [
    FUNCTION,
    {"type": "namespace", "name": "mcp__docs", "description": "Documents.", "tools": [{**FUNCTION, "name": "find"}]},
    {"type": "web_search", "external_web_access": False},
    {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark", "definition": "s"}},
]


def message(id: str, role: str, *texts: str) -> dict[str, Any]:
    """A message item; the client numbers its own."""
    kind = "output_text" if role == "assistant" else "input_text"
    return {"id": id, "type": "message", "role": role, "content": [{"type": kind, "text": text} for text in texts]}


OPENING = [
    message("msg_a", "developer", "You are a coding agent in a terminal. " * 8, "Work step by step."),
    message("msg_b", "developer", "<permissions>The sandbox may write to the working folder.</permissions>"),
    message("msg_c", "user", "<environment><cwd>/repo</cwd></environment>", "Which files are here?"),
]


def request(items: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The body of one turn."""
    return {
        "tools": TOOLS,
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-conversation",
        "client_metadata": {"session_id": "0199", "turn_id": "1"},
        "text": {"verbosity": "low"},
        "input": items,
        **fields,
    }


def answered(output: list[dict[str, Any]], result: str) -> list[dict[str, Any]]:
    """The items that the client adds for the next turn: the response's own, then the results of its calls."""
    kept = [{**item, "encrypted_content": None} if item["type"] == "reasoning" else item for item in output]
    calls = [item["call_id"] for item in output if item["type"] == "function_call"]
    return [
        *kept,
        *({"id": f"fco_{id}", "type": "function_call_output", "call_id": id, "output": result} for id in calls),
    ]
