"""The thinking before an answer: <think>…</think>, or between other marks. The prompt may have opened or closed it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from tokenspeed.text.parsers.source import LINE_ENDS, Markers, Reading
from tokenspeed.text.parsers.tool_parser import Parser

OPEN, CLOSE = "<think>", "</think>"
MARKERS = (OPEN, CLOSE)


@dataclass(frozen=True)
class Thinking:
    """How a family of models thinks.

    `marks` open and close it. `assumed`: the answer begins inside unless the prompt says otherwise. `ends`: with what a
    call begins, which ends a thinking that the model forgot to close; if `confirmed_by` is not empty, only where one of
    those follows, for a model may well think about the tag.
    """

    assumed: bool = False
    ends: tuple[str, ...] = ()
    confirmed_by: tuple[str, ...] = ()
    marks: tuple[str, str] = MARKERS


class ReasoningParser(Parser):
    """Everything up to the closing mark is reasoning, all after it content. With `calls` a call ends it as well.

    `prompt_end` is what the template wrote after the last message. Line ends after a tag and one before the closing
    tag belong to the tags: templates write them, and take them away from what is rendered again.
    """

    def __init__(self, thinking: Thinking, prompt_end: str, *, calls: bool) -> None:
        self.passing = False
        """From now on all is content: nobody need ask any more."""
        opened = opened_by(prompt_end, thinking.marks)
        self._inside = thinking.assumed if opened is None else opened
        self._marks = thinking.marks
        self._endings = _endings(thinking.marks[1], thinking.ends if calls else ())
        self._confirmed_by = thinking.confirmed_by
        super().__init__()

    def _read(self) -> Reading[None]:
        source = self.source
        before = yield from source.space()
        opening, closing = self._marks
        tag = yield from source.one_of(opening, closing)
        if tag == opening or (tag is None and self._inside):
            yield from source.space(LINE_ENDS)
            yield from self._think()
        elif tag == closing:
            yield from source.space(LINE_ENDS)
        elif before:
            self.content(before)
        self.passing = True
        yield from source.rest(self.content)

    def _think(self) -> Reading[None]:
        """The thinking up to the text behind its closing tag, or up to a call."""
        source = self.source
        while (end := (yield from source.until(self._endings, self.reasoning))) is not None:
            if end.endswith(self._marks[1]):
                yield from source.space(LINE_ENDS)
                return
            source.unread(end)
            source.mark()
            source.skip(len(end))
            yield from source.space()
            calls = not self._confirmed_by or (yield from source.one_of(*self._confirmed_by)) is not None
            source.rewind()
            if calls:
                return
            source.skip(len(end))
            self.reasoning(end)


@lru_cache(maxsize=16)
def _endings(close: str, ends: tuple[str, ...]) -> Markers:
    return Markers(*[before + text for before in ("\n", "") for text in (close, *ends)])


def opened_by(prompt_end: str, marks: tuple[str, str] = MARKERS) -> bool | None:
    """What the end of a prompt, as the template wrote it, says: True inside of the thinking, False after it."""
    opening, closing = map(prompt_end.rfind, marks)
    return None if opening == closing else opening > closing
