"""Reads a text with a parser, cut in any way, and folds the events into what a client sees."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.text.parsers.cases import TOOLS, Call
from tokenspeed.text.parsers.choose import AnswerFormat
from tokenspeed.text.parsers.events import CallArguments, CallBegun, CallEnded, Content, Event, Reasoning, TextEvent
from tokenspeed.text.parsers.tool_parser import Passage


class Reader(Protocol):
    def feed(self, text: str) -> list[Event]: ...
    def finish(self) -> list[Event]: ...
    def passage(self) -> Passage | None: ...
    def passed(self, event: TextEvent) -> None: ...


@dataclass
class Bypassing:
    """A reader that is fed only what cannot pass it; `passed` counts the rest."""

    reader: Reader
    count: int = 0

    def feed(self, text: str) -> list[Event]:
        passage = self.reader.passage()
        if passage is None or not text or not passage.plain.allows(text):
            return self.reader.feed(text)
        self.count += 1
        event = passage.event(text)
        self.reader.passed(event)
        return [event]

    def finish(self) -> list[Event]:
        return self.reader.finish()


@dataclass
class Seen:
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)


def parser(tools: str | None, reasoning: str | None = None, prompt_end: str = "", **options: Any) -> Reader:
    make = AnswerFormat(tools, reasoning).parser(TOOLS, prompt_end, **options)
    assert make is not None
    return make()


def read(reader: Reader | Bypassing, pieces: Iterable[str]) -> Seen:
    """All events, checked for their order: a call begins, gets its arguments, ends, and then the next one begins."""
    seen = Seen()
    open_index: int | None = None
    for events in (*(reader.feed(piece) for piece in pieces), reader.finish()):
        for event in events:
            match event:
                case Content(text):
                    assert text and open_index is None
                    seen.content += text
                case Reasoning(text):
                    assert text and open_index is None
                    seen.reasoning += text
                case CallBegun(index, id, name):
                    assert open_index is None and index == len(seen.calls) and id
                    open_index = index
                    seen.calls.append((name, ""))
                case CallArguments(index, fragment):
                    assert index == open_index and fragment
                    seen.calls[index] = (seen.calls[index][0], seen.calls[index][1] + fragment)
                case CallEnded(index):
                    assert index == open_index
                    open_index = None
    assert open_index is None
    return seen
