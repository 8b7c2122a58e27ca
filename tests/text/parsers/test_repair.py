"""Arguments of earlier calls: every text gives an object."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.text.parsers.repair import arguments_object


@pytest.mark.parametrize(
    ("text", "expected", "repaired"),
    [
        ('{"a": 1}', {"a": 1}, False),
        (' {"a" :1}\n', {"a": 1}, False),
        ('"{\\"a\\": 1}"', {"a": 1}, False),
        ("", {}, False),
        (" ", {}, False),
        ("null", {}, False),
        ('{"a": 1', {"a": 1}, True),
        ('{"a": "x\\', {"a": "x"}, True),
        ('{"a": [1, {"b": "c', {"a": [1, {"b": "c"}]}, True),
        ('{"a": 1, "b', {"a": 1}, True),
        ('{"a": 1, "b":', {"a": 1, "b": None}, True),
        ('{"a": 1, "b": tr', {"a": 1}, True),
        ("{'a': True}", {"a": True}, True),
        ('{"a": 1}}', {"a": 1}, True),
        ('{"a": "x\ny"}', {"a": "x\ny"}, True),
        ('{"a": "\\ud83d\\ude00 \\ud83d"}', {"a": "😀 ?"}, True),
        ("ls", {}, True),
        ("[1]", {}, True),
        ("7", {}, True),
        ('"x"', {}, True),
        ("[" * 100_000, {}, True),
    ],
)
def test_arguments_become_an_object(text: str, expected: dict[str, Any], repaired: bool) -> None:
    assert arguments_object(text) == (expected, repaired)


def test_what_is_malformed_and_too_long_is_given_up() -> None:
    assert arguments_object('{"a": 1', limit=7) == ({"a": 1}, True)
    assert arguments_object('{"a": 1', limit=6) == ({}, True)
    assert arguments_object('{"a": 1}', limit=0) == ({"a": 1}, False)


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(st.sampled_from('{}[]",:\\ntrue1 ')))
def test_no_text_raises(text: str) -> None:
    value, _ = arguments_object(text)
    assert isinstance(value, dict)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=3), st.lists(st.integers() | st.text(max_size=3)), min_size=1), st.data())
def test_what_was_complete_before_the_cut_is_kept(value: dict[str, Any], data: st.DataObject) -> None:
    text = json.dumps(value)
    cut = data.draw(st.integers(1, len(text) - 1))
    found, repaired = arguments_object(text[:cut])
    assert repaired
    assert list(found)[:-1] == list(value)[: max(0, len(found) - 1)]
    for key in list(found)[:-1]:
        assert found[key] == value[key]
