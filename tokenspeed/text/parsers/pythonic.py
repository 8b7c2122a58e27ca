"""Llama 4 and Llama 3.2: a list of calls as Python writes them, [get(city="Paris", days=3), …]."""

from __future__ import annotations

import json
import re

from tokenspeed.text.parsers.literals import literal
from tokenspeed.text.parsers.source import Markers, Reading
from tokenspeed.text.parsers.tool_parser import MAX_NAME, ToolParser

TOKENS = ("<|python_start|>", "<|python_end|>", "<|python_tag|>")
BEGIN = Markers("\n[", *TOKENS)
NAME = re.compile(r"[\w.-]+")


class PythonicParser(ToolParser):
    """A list at the begin of a line whose first call names one of the request's tools; all else is content."""

    markers = TOKENS

    def _read(self) -> Reading[None]:
        source = self.source
        before = yield from source.space()
        while True:
            if (yield from source.peek()) == "[":
                source.mark()
                source.skip()
                if (yield from self._calls()):
                    before = yield from source.space()
                    continue
                if self._open:
                    return  # cut off
                source.rewind()
            self.content(before)
            marker = yield from source.until(BEGIN, self.content)
            if marker is None:
                return
            before = ""
            if marker in TOKENS:
                yield from source.space()
            else:
                source.unread("[")
                before = "\n"

    def _calls(self) -> Reading[bool]:
        """The calls up to the closing bracket, or up to what is no call; False if there is none, or one is cut off."""
        source = self.source
        found = False
        while True:
            if found:
                source.mark()
            yield from source.space()
            name = yield from source.whole(NAME, MAX_NAME)
            yield from source.space()
            if not name or (not found and name not in self.tools) or (yield from source.one_of("(")) is None:
                if found:
                    source.rewind()
                return found
            found = True
            source.release()
            self.begin(name)
            self.argue("{")
            if not (yield from self._arguments()):
                if not (yield from source.peek()):
                    return False
                self.end()
                return True
            self.argue("}")
            self.end()
            yield from source.space()
            if (yield from source.one_of(",")) is None:
                yield from source.one_of("]")
                return True

    def _arguments(self) -> Reading[bool]:
        """Keyword arguments as the members of an object; False where they cannot go on."""
        source = self.source
        separator = ""
        while True:
            yield from source.space()
            if (yield from source.one_of(")")) is not None:
                return True
            if separator and (yield from source.one_of(",")) is None:
                return False
            yield from source.space()
            if separator and (yield from source.one_of(")")) is not None:
                return True
            source.mark()
            name = yield from source.whole(NAME, MAX_NAME)
            yield from source.space()
            if not name or (yield from source.one_of("=")) is None:
                source.rewind()
                return False
            source.release()
            yield from source.space()
            self.argue(f"{separator}{json.dumps(name)}: ")
            separator = ", "
            if not (yield from literal(source, self.argue)):
                return False
