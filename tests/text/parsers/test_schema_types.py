"""What a schema says about the type of a parameter, whatever a client sent as one."""

from __future__ import annotations

from typing import Any

import pytest

from tokenspeed.text.parsers.schema_types import fits, properties, types


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"anyOf": [{"type": "object"}, {"oneOf": [{"type": "array"}]}]}, {"object", "array"}),
        ({"enum": ["a", 1, None]}, {"string", "integer", "number", "null"}),
        ({"const": True}, {"boolean"}),
        ({"type": "string", "enum": [1]}, {"string"}),
        ({"description": "?"}, set()),
        ({"type": {"a": 1}, "enum": 5, "anyOf": {"a": 1}}, set()),
        ({"anyOf": [{"type": "null"}] * 100_000}, {"null"}),
        (True, set()),
        (None, set()),
    ],
)
def test_types_of_a_schema(schema: Any, expected: set[str]) -> None:
    assert types(schema) == expected


def test_a_boolean_is_no_number_and_an_integer_is_one() -> None:
    assert fits(1, frozenset({"number"})) and fits(1, frozenset({"integer"})) and fits(1.5, frozenset({"number"}))
    assert not fits(True, frozenset({"number", "integer"}))
    assert not fits(1.5, frozenset({"integer"}))


def test_parameters_that_are_no_object_are_none() -> None:
    assert properties({"properties": {"a": {}}}) == {"a": {}}
    assert properties({"properties": ["a"]}) == {} == properties({})
