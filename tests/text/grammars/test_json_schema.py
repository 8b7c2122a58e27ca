"""Schemas: what a grammar lets through is valid, whatever xgrammar would have passed over; the rest is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.text.grammars.alphabet import accepts, compiled, random_text
from tokenspeed.text.grammars.binding import GrammarError
from tokenspeed.text.grammars.formats import json_schema, whole
from tokenspeed.text.grammars.json_schema import MAX_VALUES


def thing(**words: Any) -> dict[str, Any]:
    return {"type": "object", **words}


INTEGER, STRING = {"type": "integer"}, {"type": "string"}
A, AB = {"a": INTEGER}, {"a": INTEGER, "b": INTEGER}

ENFORCED: list[tuple[Any, list[Any], list[Any]]] = [
    ({"type": "integer", "minimum": 3, "maximum": 10}, [3, 10], [2, 11, -5]),
    ({"type": "integer", "exclusiveMinimum": 3}, [4, 100], [3, 0]),
    ({"type": "number", "minimum": 0.5, "maximum": 2}, [0.5, 1.75, 2], [0.4, 2.1]),
    ({"type": "integer", "multipleOf": 5}, [5, 10], [7]),
    ({"minimum": 2}, [3], [1]),
    ({"type": "string", "minLength": 2, "maxLength": 4}, ["ab", "abcd"], ["a", "abcde"]),
    ({"type": "string", "pattern": "^a+b$"}, ["aab"], ["b", "xab", "abx"]),
    ({"type": "string", "pattern": "ab"}, ["xxabyy", "ab"], ["b"]),
    ({"type": "string", "pattern": "^https?://"}, ["https://x.y/z"], ["ftp://x"]),
    ({"type": "string", "pattern": "a|b"}, ["xay", "b"], ["c"]),
    ({"type": "string", "format": "date"}, ["2020-10-10"], ["x"]),
    ({"type": "string", "format": "of our own"}, ["x"], [1]),
    ({"enum": ["a", 1, None, True, {"a": 1}, [1, 2]]}, ["a", 1, None, True, {"a": 1}, [1, 2]], ["b", 2, False]),
    ({"type": "string", "enum": ["a", 1]}, ["a"], [1]),
    ({"type": ["string", "null"], "enum": ["a", None]}, ["a", None], ["b"]),
    ({"const": {"a": [1]}}, [{"a": [1]}], [{"a": [2]}]),
    ({"type": ["string", "null"]}, ["a", None], [1]),
    ({"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3], ["a"]]),
    ({"type": "array", "maxItems": 2}, [[1, "a"], []], [[1, 2, 3]]),
    ({"type": "array", "prefixItems": [INTEGER, STRING], "items": False}, [[1, "a"]], [["a", 1], [1, "a", 2]]),
    (thing(properties=AB, required=["b"]), [{"b": 1}, {"a": 1, "b": 2}], [{"a": 1}, {}]),
    (thing(properties=A), [{"a": 1}, {}], [{"a": 1, "z": 2}]),
    (thing(properties=A, additionalProperties=True), [{"a": 1, "z": 2}], [{"a": "x"}]),
    (thing(properties=A, additionalProperties=STRING), [{"a": 1, "z": "x"}], [{"a": 1, "z": 2}]),
    (thing(), [{"x": {"y": [1]}}, {}], [1, []]),
    (thing(additionalProperties=False), [{}], [{"x": 1}]),
    (thing(properties={}), [{}], [{"x": 1}]),
    ({"properties": A, "required": ["a"]}, [{"a": 1}], [{"a": "x"}, {}]),
    (thing(required=["z"]), [{"z": 2}], [{"a": 1}, {}]),
    (thing(properties=A, required=["z"]), [{"a": 1, "z": 2}], [{"a": 1}]),
    (thing(minProperties=1, maxProperties=2), [{"a": 1}], [{}, {"a": 1, "b": 2, "c": 3}]),
    (thing(patternProperties={"^x": INTEGER}, additionalProperties=False), [{"xa": 1}], [{"xa": "s"}, {"ya": 1}]),
    ({"anyOf": [STRING, INTEGER]}, ["a", 1], [None, [1]]),
    ({"oneOf": [STRING, INTEGER]}, ["a", 1], [None]),
    ({"allOf": [STRING]}, ["a"], [1]),
    (thing(properties=AB, anyOf=[{"required": ["a"]}, {"required": ["b"]}]), [{"a": 1}, {"b": 1}], [{}, 1]),
    ({"$defs": {"n": INTEGER}, **thing(properties={"a": {"$ref": "#/$defs/n"}}, required=["a"])}, [{"a": 1}], [{}]),
    (thing(properties={"c": {"$ref": "#"}}), [{"c": {"c": {}}}], [{"c": 1}]),
    ({"type": "string", "default": "x", "title": "t", "$schema": "s", "x-order": 1}, ["a"], [1]),
    ({}, [1, "a", {"x": 1}, [1], None], []),
]


@pytest.mark.parametrize(("schema", "good", "bad"), ENFORCED, ids=lambda value: json.dumps(value)[:60])
def test_what_a_schema_says_is_kept(schema: Any, good: list[Any], bad: list[Any]) -> None:
    grammar = compiled(json_schema(schema))
    assert [value for value in good if not accepts(grammar, value)] == []
    assert [value for value in bad if accepts(grammar, value)] == []


REFUSED: list[tuple[Any, str]] = [
    ({"type": "foo"}, "/type"),
    ({"type": []}, "/type"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "contains": INTEGER}, "contains"),
    (thing(properties={"a": {"not": STRING}}), "/properties/a has 'not'"),
    (thing(**{"if": {}, "then": {}}), "'if'"),
    (thing(dependentRequired={"a": ["b"]}), "dependentRequired"),
    ({"allOf": [STRING, {"minLength": 2}]}, "allOf"),
    ({"$defs": {"n": INTEGER}, "$ref": "#/$defs/n", "minimum": 5}, "minimum"),
    ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "Circular"),
    ({"$ref": "http://example.com/schema.json"}, r"\$ref"),
    ({"$ref": "#/$defs/nowhere"}, "nowhere"),
    ({"$dynamicRef": "#node"}, "dynamicRef"),
    ({"type": "string", "pattern": "^(?!a)b$"}, "pattern"),
    ({"type": "string", "pattern": "^a$", "maxLength": 3}, "pattern and a length"),
    ({"type": "string", "format": "date", "maxLength": 3}, "format and a length"),
    ({"type": "number", "multipleOf": 0.5}, "multipleOf"),
    ({"type": ["number", "null"], "multipleOf": 2}, "multipleOf"),
    ({"type": "integer", "multipleOf": 2, "minimum": 0}, "multipleOf"),
    ({"type": "string", "const": 1}, "no value of its type"),
    ({"const": 1, "enum": [2]}, "const beside enum"),
    ({"enum": ["x"], "minLength": 2}, "'minLength' beside its values"),
    (thing(properties=A, additionalProperties=False, required=["z"]), "'z'"),
    (thing(properties=A, additionalProperties=True, propertyNames={"pattern": "a"}), "propertyNames"),
    (thing(properties=A, additionalProperties=False, anyOf=[{"properties": {"b": STRING}}]), "does not allow"),
    (thing(properties=A, anyOf=[{"properties": {"b": STRING}, "additionalProperties": INTEGER}]), "does not allow"),
    ({"enum": []}, "enum"),
    ({"enum": list(range(MAX_VALUES + 1))}, "enums"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    (False, "false"),
    (5, "object or a boolean"),
    (thing(properties=[]), "/properties"),
    ({"type": "string", "format": []}, "/format"),
    (thing(required="a"), "/required"),
]


@pytest.mark.parametrize(("schema", "why"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_what_cannot_be_kept_is_refused_by_name(schema: Any, why: str) -> None:
    with pytest.raises(GrammarError, match=why) as refused:
        compiled(json_schema(schema))
    assert "/project/" not in str(refused.value) and ".cc" not in str(refused.value)


def test_a_schema_may_be_nested_64_levels_deep_and_no_deeper() -> None:
    def nested(levels: int) -> Any:
        return thing(properties={"a": nested(levels - 1)}, required=["a"]) if levels else INTEGER

    assert random_text(compiled(json_schema(nested(60))), 0) is not None
    with pytest.raises(GrammarError, match="64 levels"):
        compiled(json_schema(nested(65)))


def test_without_strict_what_cannot_be_kept_is_left_out() -> None:
    schema = thing(properties={"a": {"type": "array", "items": INTEGER, "uniqueItems": True, "not": {}}})
    grammar = compiled(json_schema(schema, strict=False))
    assert accepts(grammar, {"a": [1, 1]}) and not accepts(grammar, {"a": ["x"]})


@pytest.mark.parametrize(
    ("pattern", "anchored"),
    [("a", ".*a.*"), ("^a", "^a.*"), ("a$", ".*a$"), (r"a\$", r".*a\$.*"), (r"a\\$", r".*a\\$"), ("a|b", ".*(a|b).*")],
)
def test_a_pattern_is_found_anywhere_unless_it_is_anchored(pattern: str, anchored: str) -> None:
    assert whole(pattern) == anchored


def test_random_texts_of_a_schema_are_valid_json_of_its_shape() -> None:
    some = {"type": "array", "items": INTEGER}
    words = {"s": {"type": "string", "maxLength": 5}, "e": {"enum": ["x", None]}, "l": some}
    grammar = compiled(json_schema(thing(properties=words, required=["s", "e"])))
    texts = [text for seed in range(30) if (text := random_text(grammar, seed)) is not None]
    assert len(texts) > 20
    for text in texts:
        value = json.loads(text)
        assert set(value) >= {"s", "e"} and set(value) <= set(words) and len(value["s"]) <= 5
