"""What a JSON schema lets a parameter be, for formats that write values without quotes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KINDS: Mapping[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
    "array": (list,),
    "object": (dict,),
}

MAX_ALTERNATIVES = 64
"""Alternatives of a schema that are looked at: more, or nested ones, do not make a request slow."""


def properties(schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters' schemas by name; whatever else a client sent there counts as none."""
    found = schema.get("properties")
    return found if isinstance(found, Mapping) else {}


def types(schema: object) -> frozenset[str]:
    """The JSON types that a value of this schema may have; empty when the schema does not say."""
    found: set[str] = set()
    queue = [schema]
    for alternative in queue:
        if not isinstance(alternative, Mapping):
            continue
        named = alternative.get("type")
        found.update(kind for kind in KINDS if kind == named or (isinstance(named, list) and kind in named))
        values = [*_items(alternative.get("enum")), *([alternative["const"]] if "const" in alternative else [])]
        if named is None:
            found.update(kind for value in values for kind, classes in KINDS.items() if type(value) in classes)
        for key in ("anyOf", "oneOf", "allOf"):
            queue.extend(_items(alternative.get(key))[: MAX_ALTERNATIVES - len(queue)])
    return frozenset(found)


def fits(value: object, kinds: frozenset[str]) -> bool:
    """Whether a value is of one of the types."""
    return any(type(value) in KINDS[kind] for kind in kinds)


def _items(value: object) -> list[Any]:
    return value[:MAX_ALTERNATIVES] if isinstance(value, list) else []
