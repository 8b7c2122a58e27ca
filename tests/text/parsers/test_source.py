"""Markers and the text they are looked for in."""

from __future__ import annotations

import re
from collections.abc import Generator

import pytest

from tokenspeed.text.parsers.source import Markers, Reading, Source

WORD = re.compile(r"\w+")


def drive(source: Source, reading: Reading[str | None], *pieces: str) -> str | None:
    """Feed the pieces, then the end; gives what the reader returns."""
    steps: Generator[None, None, str | None] = reading
    for piece in pieces:
        source.append(piece)
        try:
            next(steps)
        except StopIteration as done:
            return str(done.value)
    source.ended = True
    with pytest.raises(StopIteration) as ended:
        next(steps)
    value = ended.value.value
    return None if value is None else str(value)


@pytest.mark.parametrize("texts", [("abc", "ab"), ("xaby", "ab")])
def test_markers_that_depend_on_what_has_come_are_refused(texts: tuple[str, str]) -> None:
    with pytest.raises(AssertionError, match="lies inside"):
        Markers(*texts)


@pytest.mark.parametrize(
    ("text", "held"),
    [("", 0), ("a", 0), ("a<", 1), ("a<t", 2), ("<t", 2), ("<tx", 0), ("\n", 1), ("a\n<t", 3), ("<<", 1)],
)
def test_only_the_begin_of_a_marker_is_held(text: str, held: int) -> None:
    assert Markers("\n<tag>", "<tag>").held(text, 0) == held


def test_text_is_passed_on_up_to_the_leftmost_marker() -> None:
    for cut in range(12):
        source, passed = Source(), list[str]()
        text = "ab\n<tag><two>"
        found = drive(source, source.until(Markers("<two>", "<tag>", "\n<tag>"), passed.append), text[:cut], text[cut:])
        assert (found, "".join(passed)) == ("\n<tag>", "ab")


def test_the_end_lets_the_begin_of_a_marker_go() -> None:
    source, passed = Source(), list[str]()
    assert drive(source, source.until(Markers("<tag>"), passed.append), "a<t", "a") is None
    assert "".join(passed) == "a<ta"


def test_a_rewound_text_is_read_again_whatever_has_come_since() -> None:
    source = Source()
    source.append("skip one")
    source.skip(5)
    source.mark()
    source.skip(3)
    source.append(" two")
    source.skip(2)
    source.append(" three")
    source.rewind()
    rest: list[str] = []
    source.ended = True
    assert list(source.rest(rest.append)) == []
    assert "".join(rest) == "one two three"


def test_a_released_mark_keeps_nothing() -> None:
    source = Source()
    source.append("one")
    source.mark()
    source.skip(3)
    source.append("two")
    source.release()
    source.mark()
    source.skip(3)
    source.rewind()
    assert drive(source, source.one_of("one", "two")) == "two"


@pytest.mark.parametrize("cut", range(9))
def test_a_run_is_whole_however_it_comes_and_no_longer_than_its_limit(cut: int) -> None:
    for text, limit, found in (("word and", 9, "word"), ("wordword", 4, "word"), ("word", 9, "word"), (" ", 9, "")):
        source = Source()
        assert drive(source, source.whole(WORD, limit), text[:cut], text[cut:]) == found
