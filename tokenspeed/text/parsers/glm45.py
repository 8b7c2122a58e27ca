"""GLM 4.5 and later: <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>, line ends between.

Nothing in a value is escaped, and its line ends are its own: a closing tag ends a value only if what follows it may
follow it.
"""

from __future__ import annotations

import json
import re

from tokenspeed.text.parsers.bare_values import TEXT, typed
from tokenspeed.text.parsers.schema_types import properties, types
from tokenspeed.text.parsers.source import Emit, Markers, Reading
from tokenspeed.text.parsers.tool_parser import MAX_NAME, ToolParser

CALL, CALL_END = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"

NAME = re.compile(r"[^\s<>{}]+")
KEY_NAME = re.compile(r"[^<>\n]+")
# GLM 4.5's template writes a line end before a call, which is rendered again.
BEGIN = Markers("\n" + CALL, CALL)
ENDS = Markers(VALUE_END, CALL_END)


class Glm45Parser(ToolParser):
    """Values are typed by the tool's schema; those that are text for certain come as they are generated."""

    markers = (CALL, CALL_END, KEY, KEY_END, VALUE, VALUE_END)

    def _read(self) -> Reading[None]:
        source = self.source
        while (marker := (yield from source.until(BEGIN, self.content))) is not None:
            source.mark()
            yield from source.space()
            name = yield from source.whole(NAME, MAX_NAME)
            yield from source.space()
            tag = yield from source.one_of(KEY, CALL_END)
            if not name or tag is None:
                source.rewind()
                self.content(marker)
                continue
            source.release()
            self.begin(name)
            if not (yield from self._arguments(name, tag)):
                return
            self.end()
            yield from source.space()

    def _arguments(self, function: str, tag: str | None) -> Reading[bool]:
        """The arguments from the first tag on as an object; False if the text ends before they do."""
        source = self.source
        schemas = properties(self.tools.get(function, {}))
        separator = "{"
        while tag == KEY:
            name = (yield from source.whole(KEY_NAME, MAX_NAME)).strip()
            closed = yield from source.one_of(KEY_END)
            yield from source.space()
            if not name or closed is None or (yield from source.one_of(VALUE)) is None:
                break
            self.argue(f"{separator}{json.dumps(name, ensure_ascii=False)}: ")
            separator = ", "
            if not (yield from self._value(types(schemas.get(name)) or TEXT)):
                return False
            yield from source.space()
            tag = yield from source.one_of(KEY, CALL_END)
        if tag != CALL_END and not (yield from source.peek()):
            return False
        # At </tool_call>, or at what cannot follow: the call is over.
        self.argue("{}" if separator == "{" else "}")
        return True

    def _value(self, kinds: frozenset[str]) -> Reading[bool]:
        """Read a value and the tag that ends it as JSON of one of these types; False if the text ends within."""
        if kinds == TEXT:
            self.argue('"')
            complete = yield from self._text(self.argue_quoted)
            self.argue('"' if complete else "")
            return complete
        parts: list[str] = []
        complete = yield from self._text(parts.append)
        text = "".join(parts)
        self.argue(typed(text, kinds) if complete else text)
        return complete

    def _text(self, emit: Emit) -> Reading[bool]:
        """Pass on the characters of a value. True behind the </arg_value> that ends it, or before </tool_call>."""
        source = self.source
        while (tag := (yield from source.until(ENDS, emit))) is not None:
            source.unread(tag)
            source.mark()
            source.skip(len(tag))
            ends = yield from self._ends(tag)
            source.rewind()
            if ends and tag == CALL_END:
                return True
            source.skip(len(tag))
            if ends:
                return True
            emit(tag)
        return False

    def _ends(self, tag: str) -> Reading[bool]:
        """Whether a tag that has just been read ends the value: whether what follows may follow it there."""
        source = self.source
        yield from source.space()
        if not (yield from source.peek()):
            return True
        # </arg_value> forgotten before </tool_call>: only where the next call follows
        return (yield from source.one_of(*((KEY, CALL_END) if tag == VALUE_END else (CALL,)))) is not None
