"""JSON and Python literals, read as they come, written as JSON."""

from __future__ import annotations

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.text.parsers.literals import as_json, literal
from tokenspeed.text.parsers.source import Source


def pieces(text: str) -> list[str]:
    """What each character of the text passes on."""
    source, made, told = Source(), list[str](), list[str]()
    reading = literal(source, made.append)
    for character in text:
        source.append(character)
        try:
            next(reading)
        except StopIteration:
            told.append("".join(made))
            break
        told.append("".join(made))
    return told


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ('{"a": [1, 2.5e-3, true, null, "x"]}', '{"a": [1, 2.5e-3, true, null, "x"]}'),
        ("[ 1 ,\n2 , ]", "[ 1 ,\n2 ]"),
        ("{'a': (1, 'b',), \"c\": None}", '{"a": [1, "b"], "c": null}'),
        ("()", "[]"),
        ("1_000", "1000"),
        ("0x1f", "31"),
        (".5", "0.5"),
        ("+1.", "1.0"),
        ("-7", "-7"),
        ("007", "007"),
        ("1e999", "1e999"),
        ("inf", "inf"),
        ("False", "false"),
        ("'it\\'s \"x\"'", '"it\'s \\"x\\""'),
        ("'''a\n'b''c'''", '"a\\n\'b\'\'c"'),
        ('"\\d\\w\\/\\u00e9\\t"', '"\\\\d\\\\w\\/\\u00e9\\t"'),
        ('"\\user\\x4a\\U0001F600\\x"', '"\\\\userJ\\ud83d\\ude00\\\\x"'),
        ('"tab\there"', '"tab\\there"'),
        ("'a\\\nb\\0'", '"ab\\u0000"'),
        ('""', '""'),
    ],
)
def test_a_literal_is_written_as_json(text: str, written: str) -> None:
    assert as_json(text) == written
    assert as_json(f" {text} ") == written


@pytest.mark.parametrize("text", ["", "{", '"a', "[1}", "{a=1}", "1 2", "@", '{"a" 1}x', "'''a''", "[1,"])
def test_what_is_no_literal_is_none(text: str) -> None:
    assert as_json(text) is None


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False),
        lambda inner: st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_every_value_that_python_writes_is_read(value: object) -> None:
    written = as_json(repr(value))
    assert written is not None
    assert json.loads(written) == json.loads(json.dumps(ast.literal_eval(repr(value))))


def test_all_is_passed_on_but_what_is_not_decided() -> None:
    told = pieces('["ab", 12, true]')
    assert told[3] == '["ab'
    assert told[5] == told[6] == '["ab"', "the comma waits for another value"
    assert told[7] == told[8] == '["ab", ', "and a number for its end"
    assert told[-1] == '["ab", 12, true]'


def test_nesting_needs_no_stack() -> None:
    assert as_json("[" * 50_000 + "]" * 50_000) == "[" * 50_000 + "]" * 50_000
