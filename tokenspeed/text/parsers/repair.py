"""Arguments of earlier calls, as clients send them back, as the object that a template expects."""

from __future__ import annotations

import json
import re
from collections import deque
from typing import Any

from tokenspeed.text.parsers.literals import literal
from tokenspeed.text.parsers.source import Source

CLOSING = {"{": "}", "[": "]"}
PARTS = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}\[\],]', re.DOTALL)
MAX_CUTS = 4
"""Members at the end that may be given up to make an object of what was cut off."""
MAX_REPAIRED = 1 << 20
"""Characters, of a whole conversation too: what is malformed beyond that is given up. One million take up to 2 s."""
MAX_DEPTH = 500
"""Brackets; JSON that is nested much deeper is not read in Python."""


def arguments_object(text: str, limit: int = MAX_REPAIRED) -> tuple[dict[str, Any], bool]:
    """The object that `text` is, and whether it had to be repaired.

    Text that was cut off keeps what is complete; text that is no object at all, not even as a string of JSON, or that
    is malformed and longer than `limit`, gives an empty one. Blank text and null are an empty object by right.
    """
    if text.strip() in ("", "null"):
        return {}, False
    value = _object(text)
    repaired = value is None
    if value is None and len(text) <= limit:
        value = _object(_from_literal(text))
    whole = _without_surrogates(value or {})
    return whole, repaired or whole != value


def _object(text: str) -> dict[str, Any] | None:
    """The object that JSON text is, or that the JSON text in a JSON string is."""
    value = _loaded(text)
    if isinstance(value, str):
        value = _loaded(value)
    return value if isinstance(value, dict) else None


def _from_literal(text: str) -> str:
    """JSON of the literal that `text` begins with, with everything closed that it leaves open."""
    source = Source.of_all(text.strip())
    made: list[str] = []
    try:
        next(literal(source, made.append))
    except StopIteration as done:
        if done.value:
            return "".join(made)
    begun = "".join(made)
    for end, closing in _ends(begun):
        for candidate in (begun[:end] + closing, begun[:end] + "null" + closing):
            if _loaded(candidate) is not None:
                return candidate
    return ""


def _ends(begun: str) -> list[tuple[int, str]]:
    """Where the text could end, the last place first, and what closes the string and the brackets open there."""
    closing = ""
    ends: deque[tuple[int, str]] = deque(maxlen=MAX_CUTS)
    quote = ""
    for part in PARTS.finditer(begun):
        text = part.group()
        if text in CLOSING:
            closing = CLOSING[text] + closing
            if len(closing) > MAX_DEPTH:
                return []
            ends.append((part.end(), closing))
        elif text in ("}", "]"):
            closing = closing[1:]
        elif text == ",":
            ends.append((part.start(), closing))
        elif part.end() == len(begun) and (len(text) == 1 or not text.endswith('"') or _loaded(text) is None):
            quote = '"'
    return [(len(begun), quote + closing), *reversed(ends)]


def _without_surrogates(value: dict[str, Any]) -> dict[str, Any]:
    """The same object, or one in which halves of surrogate pairs, which no text can hold, are question marks."""
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return dict(json.loads(text.encode("utf-8", "replace")))
    return value


def _loaded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
