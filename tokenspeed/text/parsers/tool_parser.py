"""What all parsers are: text in, events out; and what those of tool calls have in common."""

from __future__ import annotations

import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from tokenspeed.text.parsers.events import CallArguments, CallBegun, CallEnded, Content, Event, Reasoning, TextEvent
from tokenspeed.text.parsers.source import Emit, Plain, Reading, Source

Tools = Mapping[str, Mapping[str, Any]]
"""The tools of a request: name → JSON schema of the parameters."""

MAX_NAME = 256
"""Characters of a tool's name; what is longer is no name."""


class Passage(NamedTuple):
    """Text that is `plain` would be told as it is, at once, as more of an event of this kind (of this call).

    With `quoted` it would be told as JSON has it inside of a string.
    """

    plain: Plain
    kind: type[TextEvent]
    call: int = 0
    quoted: bool = False

    def event(self, text: str) -> TextEvent:
        """What is told of such a text."""
        if self.kind is CallArguments:
            return CallArguments(self.call, quoted(text) if self.quoted else text)
        return Content(text) if self.kind is Content else Reasoning(text)


def quoted(text: str) -> str:
    """A text as JSON has it inside of a string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


class Parser(ABC):
    """Reads one answer. The events of all `feed`s and of `finish` are the same in sum however the text is cut.

    Text is held back only while what follows decides what it is. Nothing that a model writes raises.
    """

    def __init__(self) -> None:
        self.source = Source()
        self._events: list[Event] = []
        self._reading: Reading[None] | None = self._read()
        self._waiting: tuple[Plain, Emit] | None = None

    def feed(self, text: str) -> list[Event]:
        """The events that this text completes; neighbours of one kind are one."""
        self.source.append(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """The events of what was held back; there is no more text."""
        self.source.ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        if self._reading is not None:
            waiting = next(self._reading, self)
            if waiting is self:
                self._reading = self._waiting = None
            else:
                self._waiting = waiting  # type: ignore[assignment]
        events, self._events = self._events, []
        return events

    def passage(self) -> Passage | None:
        """The text that need not be fed, because it would only be told; None if all must be."""
        if self._waiting is None or self.source.marked:
            return None
        plain, emit = self._waiting
        return self._passed_to(plain, emit)

    def _passed_to(self, plain: Plain, emit: Emit) -> Passage | None:
        if emit == self.content:
            return Passage(plain, Content)
        return Passage(plain, Reasoning) if emit == self.reasoning else None

    @abstractmethod
    def _read(self) -> Reading[None]:
        """Read the whole text, telling what it is by the methods below; return only at its end."""

    def content(self, text: str) -> None:
        """This is content."""
        last = self._events[-1] if self._events else None
        if isinstance(last, Content):
            self._events[-1] = Content(last.text + text)
        else:
            self._events.append(Content(text))

    def reasoning(self, text: str) -> None:
        """This is reasoning."""
        last = self._events[-1] if self._events else None
        if isinstance(last, Reasoning):
            self._events[-1] = Reasoning(last.text + text)
        else:
            self._events.append(Reasoning(text))


class ToolParser(Parser):
    """Finds tool calls. Blank content before a call is dropped: it is part of the format.

    `markers` are the texts that must reach the parser even where they are special tokens.
    """

    markers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, tools: Tools) -> None:
        super().__init__()
        self.tools = tools
        self._index = -1
        self._open = False
        self._argued = False
        self._blank: str | None = ""

    def finish(self) -> list[Event]:
        """As for every parser; a call that is still open is cut off."""
        events = super().finish()
        if self._blank and self._index < 0:
            events.append(Content(self._blank))
        self._blank = None
        if self._open:
            self._open = False
            events.append(CallEnded(self._index))
        return events

    def _passed_to(self, plain: Plain, emit: Emit) -> Passage | None:
        if emit in (self.argue, self.argue_quoted):
            return Passage(plain, CallArguments, self._index, emit == self.argue_quoted) if self._argued else None
        return super()._passed_to(plain, emit) if self._blank is None else None

    def content(self, text: str) -> None:
        if self._blank is not None:
            text = self._blank + text
            self._blank = text if text.isspace() else None if text else ""
        if text and self._blank is None:
            super().content(text)

    def begin(self, name: str, id: str | None = None) -> None:
        """A call begins."""
        self._index += 1
        self._open, self._argued, self._blank = True, False, None
        self._events.append(CallBegun(self._index, id or self.call_id(name, self._index), name))

    def argue(self, fragment: str) -> None:
        """More of the arguments of the call that is open."""
        if not fragment:
            return
        self._argued = True
        last = self._events[-1] if self._events else None
        if isinstance(last, CallArguments):
            self._events[-1] = CallArguments(self._index, last.fragment + fragment)
        else:
            self._events.append(CallArguments(self._index, fragment))

    def argue_quoted(self, text: str) -> None:
        """More of a string in the arguments of the call that is open."""
        self.argue(quoted(text))

    def end(self) -> None:
        """The call is over. One without arguments has an empty object of them."""
        if not self._argued:
            self.argue("{}")
        self._open = False
        self._events.append(CallEnded(self._index))

    def call_id(self, name: str, index: int) -> str:
        """An id for a call whose format has none."""
        return f"call_{uuid.uuid4().hex[:24]}"
