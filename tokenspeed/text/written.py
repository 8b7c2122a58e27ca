"""JSON values that remember how they were written.

A model writes a call's arguments in its own way, a client sends them back in another: `{"a":"b"}` for `{"a": "b"}`.
Templates get them as objects, and `tojson` writes an object of this kind as the model did, so that the prompt goes on
with what was generated.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

DEPTH = 4
"""How far down in a value arguments may be: calls, a call, its function, the arguments."""
MAX_DEPTH = 8
"""Levels of arguments whose text is kept."""

_OBJECT: msgspec.json.Decoder[dict[str, msgspec.Raw]] = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ARRAY: msgspec.json.Decoder[list[msgspec.Raw]] = msgspec.json.Decoder(list[msgspec.Raw])


class WrittenObject(dict[str, Any]):
    """An object and its JSON text."""

    def __init__(self, members: dict[str, Any], text: str) -> None:
        super().__init__(members)
        self.written_as = text


class WrittenArray(list[Any]):
    """An array and its JSON text."""

    def __init__(self, items: list[Any], text: str) -> None:
        super().__init__(items)
        self.written_as = text


def written_object(text: str) -> WrittenObject | None:
    """The object that JSON text is, the objects and arrays in it with their texts too; None if it is none."""
    try:
        value = _written(text.strip(), MAX_DEPTH)
        json.dumps(value, ensure_ascii=False).encode()
    except (msgspec.DecodeError, ValueError, RecursionError):  # half a surrogate pair is a ValueError
        return None
    return value if isinstance(value, WrittenObject) else None


def _written(text: str, depth: int) -> Any:
    if depth and text.startswith("{"):
        members = {key: _written(bytes(raw).decode(), depth - 1) for key, raw in _OBJECT.decode(text).items()}
        return WrittenObject(members, text)
    if depth and text.startswith("["):
        return WrittenArray([_written(bytes(raw).decode(), depth - 1) for raw in _ARRAY.decode(text)], text)
    return json.loads(text)


def json_text(value: Any) -> str:
    """JSON as templates write it by default, except for what is there as it was written."""
    if not _has_written(value, DEPTH):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, WrittenObject | WrittenArray):
        return value.written_as
    if isinstance(value, dict):
        members = [f"{json.dumps(key, ensure_ascii=False)}: {json_text(item)}" for key, item in value.items()]
        return "{" + ", ".join(members) + "}"
    return "[" + ", ".join([json_text(item) for item in value]) + "]"


def _has_written(value: Any, depth: int) -> bool:
    if isinstance(value, WrittenObject | WrittenArray):
        return True
    if not depth or not isinstance(value, (dict, list, tuple)):
        return False
    if not isinstance(value, dict):
        return any([_has_written(item, depth - 1) for item in value])
    return all([isinstance(key, str) for key in value]) and any(
        [_has_written(item, depth - 1) for item in value.values()]
    )
