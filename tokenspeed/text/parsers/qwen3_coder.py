"""Qwen3-Coder: calls as tags around bare values, <function=NAME><parameter=NAME>VALUE</parameter></function>.

Nothing in a value is escaped, so a value may contain the very tags that end it: a file about this format does. A
closing tag therefore ends a value only if what follows it may follow it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Set

from tokenspeed.text.parsers.bare_values import TEXT, typed
from tokenspeed.text.parsers.schema_types import properties, types
from tokenspeed.text.parsers.source import Emit, Markers, Reading
from tokenspeed.text.parsers.tool_parser import MAX_NAME, ToolParser

CALL, CALL_END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"

NAME = re.compile(r"[^<>\n]+")

# A call without <tool_call>, which the model forgets at times, must name one of the request's tools.
BEGIN = Markers("\n" + CALL, CALL, "\n" + FUNCTION, FUNCTION)
TAGS = Markers("\n" + PARAMETER_END, PARAMETER_END, "\n" + FUNCTION_END, FUNCTION_END, "\n" + PARAMETER)


class Qwen3CoderParser(ToolParser):
    """Values are typed by the tool's schema; those that are text for certain come as they are generated."""

    markers = (CALL, CALL_END)

    def _read(self) -> Reading[None]:
        source = self.source
        while (marker := (yield from source.until(BEGIN, self.content))) is not None:
            source.mark()
            if marker.endswith(CALL):
                yield from source.space()
                name = "" if (yield from source.one_of(FUNCTION)) is None else (yield from self._name())
            else:
                name = yield from self._name()
                name = name if name in self.tools else ""
            if not name:
                source.rewind()
                self.content(marker)
                continue
            source.release()
            self.begin(name)
            if not (yield from self._parameters(name)):
                return
            self.end()
            yield from source.space()
            yield from source.one_of(CALL_END)
            yield from source.space()

    def _name(self) -> Reading[str]:
        """The rest of a tag that ends in a name and >, "" if it does not."""
        name = yield from self.source.whole(NAME, MAX_NAME)
        return "" if (yield from self.source.one_of(">")) is None else name.strip()

    def _parameters(self, function: str) -> Reading[bool]:
        """The parameters as the members of an object; False if the text ends before they do."""
        source = self.source
        schemas = properties(self.tools.get(function, {}))
        given: set[str] = set()
        self.argue("{")
        while True:
            yield from source.space()
            tag = yield from source.one_of(PARAMETER, PARAMETER_END, FUNCTION_END)
            if tag == PARAMETER_END:
                continue
            name = (yield from self._name()) if tag == PARAMETER else ""
            if not name:
                if tag != FUNCTION_END and not (yield from source.peek()):
                    return False
                # At </function>, or at what cannot follow: the call is over.
                self.argue("}")
                return True
            self.argue((", " if given else "") + json.dumps(name, ensure_ascii=False) + ": ")
            given.add(name)
            missing = schemas.keys() - given
            if not (yield from self._value(types(schemas.get(name)) or TEXT, missing)):
                return False

    def _value(self, kinds: frozenset[str], missing: Set[str]) -> Reading[bool]:
        """Read a value, up to the tag that ends it, as JSON of one of these types; False if the text ends within."""
        yield from self.source.one_of("\n")
        if kinds == TEXT:
            self.argue('"')
            complete = yield from self._text(self.argue_quoted, missing)
            self.argue('"' if complete else "")
            return complete
        parts: list[str] = []
        complete = yield from self._text(parts.append, missing)
        text = "".join(parts)
        self.argue(typed(text, kinds) if complete else text)
        return complete

    def _text(self, emit: Emit, missing: Set[str]) -> Reading[bool]:
        """Pass on the characters of a value. True at the tag that ends it, which is still to be read."""
        source = self.source
        while (marker := (yield from source.until(TAGS, emit))) is not None:
            tag = marker.removeprefix("\n")
            source.unread(tag)
            source.mark()
            source.skip(len(tag))
            ends = yield from self._ends(tag, missing)
            source.rewind()
            if ends:
                return True
            source.skip(len(tag))
            emit(marker)
        return False

    def _ends(self, tag: str, missing: Set[str]) -> Reading[bool]:
        """Whether a tag that has just been read ends the value: whether what follows may follow it there."""
        source = self.source
        if tag == PARAMETER:  # </parameter> forgotten: only for a parameter that the tool has and that is missing
            return (yield from self._name()) in missing
        yield from source.space()
        if tag == PARAMETER_END:
            after = yield from source.one_of(PARAMETER, FUNCTION_END, CALL_END)
            return after is not None or not (yield from source.peek())
        # </parameter> forgotten before </function>: only where the call, and with it the text or the next call, ends
        after = yield from source.one_of(CALL_END)
        yield from source.space()
        if not (yield from source.peek()):
            return True
        return after is not None and (yield from source.one_of(CALL)) is not None
