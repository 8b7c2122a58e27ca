"""Values that a format writes without quotes: text as it is, anything else as JSON. The tool's schema says which."""

from __future__ import annotations

import json
from typing import NoReturn

from tokenspeed.text.parsers.literals import as_json
from tokenspeed.text.parsers.schema_types import fits

TEXT = frozenset({"string"})
"""The type of a value that is text for certain, and of one of which nothing is known."""


def typed(text: str, kinds: frozenset[str]) -> str:
    """JSON of the value that `text` is: of one of the types if it can be read so, else a string."""
    found = as_json(text)
    if found is not None:
        try:
            value = json.loads(found, parse_constant=_no_number)
        except (ValueError, RecursionError):
            found = None
        else:
            found = found if "string" not in kinds or fits(value, kinds - TEXT) else None
    return json.dumps(text, ensure_ascii=False) if found is None else found


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON")
