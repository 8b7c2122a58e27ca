"""Grammars as formats of xgrammar's structural tags: one language for all that a request may ask for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from tokenspeed.request import Grammar

Format = dict[str, Any]

MAX_SPACE = 64
"""Blanks in a row that JSON may have between its parts: room for indentation, none for a model that writes nothing
but line ends until its tokens are spent."""


def text(value: str) -> Format:
    """Exactly this text."""
    return {"type": "const_string", "value": value}


def regex(pattern: str) -> Format:
    """A text that the pattern matches from its begin to its end."""
    return {"type": "regex", "pattern": pattern}


def json_schema(schema: Any, **how: Any) -> Format:
    """JSON of a schema."""
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_SPACE, **how}


def sequence(*formats: Format) -> Format:
    """One after the other."""
    return {"type": "sequence", "elements": list(formats)}


def either(formats: Sequence[Format]) -> Format:
    """One of several."""
    return formats[0] if len(formats) == 1 else {"type": "or", "elements": list(formats)}


def optional(format: Format) -> Format:
    """Once or not at all."""
    return {"type": "optional", "content": format}


def some(format: Format, *, least: int, most: int = -1) -> Format:
    """So many times; −1 is no limit."""
    return {"type": "repeat", "min": least, "max": most, "content": format}


def separated(tags: Sequence[Format], separator: str) -> Format:
    """At least one of these tags, a text between each and the next."""
    return {"type": "tags_with_separator", "tags": list(tags), "separator": separator, "at_least_one": True}


def tag(begin: str, content: Format, end: str) -> Format:
    """A content between two texts."""
    return {"type": "tag", "begin": begin, "content": content, "end": end}


def until(end: str) -> Format:
    """Any text that ends with this one, and has it nowhere else."""
    return tag("", {"type": "any_text"}, end)


def whole(pattern: str) -> str:
    """A pattern that may be found anywhere as one that matches the whole text: xgrammar anchors all of them."""
    ends = re.search(r"(?<!\\)(?:\\\\)*\$$", pattern) is not None
    starts = pattern.startswith("^")
    if not (starts or ends) and "|" in pattern:
        return f".*({pattern}).*"
    if "|" in pattern:
        return pattern
    return f"{'' if starts else '.*'}{pattern}{'' if ends else '.*'}"


def as_format(grammar: Grammar) -> Format:
    """What a grammar asks for as a format. Raises `ValueError` for JSON that is none, or not of its kind."""
    format = _asked(grammar)
    if grammar.thinking == "none":
        return format
    opening, closing = grammar.marks
    thought = sequence(until(closing), regex("[\\r\\n]*"))
    if grammar.thinking == "allowed":
        thought = optional(sequence(regex("[\\r\\n]*"), text(opening), thought))
    return sequence(thought, format)


def _asked(grammar: Grammar) -> Format:
    if grammar.kind == "regex":
        return regex(grammar.text)
    if grammar.kind == "ebnf":
        return {"type": "grammar", "grammar": grammar.text}
    value = json.loads(grammar.text)
    if grammar.kind == "json_schema":
        return json_schema(value, strict=grammar.strict)
    if grammar.kind == "choice":
        return _choice(value)
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    return value


def _choice(choices: Any) -> Format:
    if not isinstance(choices, list) or not choices or any(not isinstance(item, str) or not item for item in choices):
        raise ValueError("must be a list of at least one text, none of them empty")
    return either([text(choice) for choice in dict.fromkeys(choices)])
