"""Tools for templates that render calls and their results but never the tools: DeepSeek's own.

DeepSeek leaves it to the client to describe the tools in the system message, which agents do not do. It is done here
in the words of the model's card; the format's tokens count as the template's, everything about the tools as the
request's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenspeed.text.provenance import Text, concatenated, from_request, from_template

BEFORE = "## Tools\nYou have access to the following tools:\n"
FORMAT = "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
CALL_V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments<｜tool▁call▁end｜>"
    "{{additional_tool_calls}}<｜tool▁calls▁end｜>"
)
CALL_V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>tool_call_name\n```json\ntool_call_arguments\n```"
    "<｜tool▁call▁end｜>\n{{additional_tool_calls}}<｜tool▁calls▁end｜>"
)
AFTER = """

Where:

- `tool_call_name` must be an exact match to one of the available tools
- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema
- For multiple tool calls, chain them directly without separators or spaces"""

CALLS: Mapping[str, str] = {"deepseek_v3": CALL_V3, "deepseek_v31": CALL_V31}
"""By the parser of the format: those in which tools can be described here."""


def describe(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], parser: str) -> list[Any]:
    """The messages with `tools` described at the end of the system message, which is made if there is none."""
    text = _description(tools, CALLS[parser])
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    content = concatenated([from_request(first["content"]), from_template("\n\n"), text])
    return [{**first, "content": content}, *messages[1:]]


def _description(tools: Sequence[Mapping[str, Any]], call: str) -> Text:
    parts: list[str] = [from_template(BEFORE)]
    for tool in tools:
        function = tool["function"]
        parts += (
            from_template("\n### "),
            from_request(function["name"]),
            from_template("\nDescription: "),
            from_request(function.get("description", "")),
            from_template("\n\nParameters: "),
            from_request(json.dumps(function["parameters"], ensure_ascii=False)),
            from_template("\n"),
        )
    return concatenated([*parts, from_template(FORMAT + call + AFTER)])
