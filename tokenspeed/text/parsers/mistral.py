"""Mistral: [TOOL_CALLS]NAME[ARGS]{…} for each call, or as before [TOOL_CALLS] and a list of JSON objects for all."""

from __future__ import annotations

import re
import uuid

from tokenspeed.text.parsers.json_call import JsonCall
from tokenspeed.text.parsers.literals import arguments
from tokenspeed.text.parsers.source import Markers, Reading
from tokenspeed.text.parsers.tool_parser import MAX_NAME, ToolParser

CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
THINK, THINK_END = "[THINK]", "[/THINK]"
BEGIN = Markers(CALLS)
NAME = re.compile(r'[^\s\[\]{}"]+')
ID_CHARS = 9
"""Of a call's id: the templates refuse all others."""
ID = re.compile(f"[a-zA-Z0-9]{{{ID_CHARS}}}")


class MistralParser(ToolParser):
    """Reads both: models go on in the way of their templates."""

    markers = (CALLS, CALL_ID, ARGS)

    def _read(self) -> Reading[None]:
        source = self.source
        while (marker := (yield from source.until(BEGIN, self.content))) is not None:
            source.mark()
            yield from source.space()
            listed = (yield from source.one_of("[")) is not None
            read = yield from (self._list() if listed else self._named())
            if read is None:
                return
            if not read:
                source.rewind()
                self.content(marker)
            else:
                yield from source.space()

    def call_id(self, name: str, index: int) -> str:
        return uuid.uuid4().hex[:ID_CHARS]

    def _named(self) -> Reading[bool | None]:
        """One call. False if it is none, None if the text ends within."""
        source = self.source
        name = yield from source.whole(NAME, MAX_NAME)
        yield from source.space()
        tag = yield from source.one_of(CALL_ID, ARGS)
        id = None
        if tag == CALL_ID:
            id = yield from source.whole(NAME, MAX_NAME)
            tag = yield from source.one_of(ARGS)
        if not name or (tag is None and (yield from source.peek()) != "{"):
            return False
        source.release()
        self.begin(name, id if id is not None and ID.fullmatch(id) else None)
        yield from source.space()
        # Another call, where there are no arguments, begins as a list would.
        if (yield from source.peek()) == "[" or not (yield from arguments(source, self.argue)):
            marker = yield from source.until(BEGIN, self.argue)
            if marker is None:
                return None
            source.unread(marker)
        self.end()
        return True

    def _list(self) -> Reading[bool | None]:
        """The objects of a list: as `_named`. What can be none of it ends it."""
        source = self.source
        begun = False
        while True:
            call = JsonCall(self)
            if not (yield from call.read()):
                if begun:
                    source.rewind()
                return begun
            if not call.complete and not (yield from source.peek()):
                return None
            begun = True
            self.end()
            yield from source.space()
            if (yield from source.one_of(",")) is None:
                yield from source.one_of("]")
                return True
            source.mark()
