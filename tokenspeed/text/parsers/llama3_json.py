"""Llama 3: calls as bare JSON objects, {"name": …, "parameters": {…}}, several of them separated by semicolons."""

from __future__ import annotations

from tokenspeed.text.parsers.json_call import JsonCall
from tokenspeed.text.parsers.source import Markers, Reading
from tokenspeed.text.parsers.tool_parser import ToolParser

PYTHON_TAG = "<|python_tag|>"
BEGIN = Markers(PYTHON_TAG, "\n{")


class Llama3JsonParser(ToolParser):
    """An object at the begin of a line is a call if it names one of the request's tools; all else is content."""

    markers = (PYTHON_TAG,)

    def _read(self) -> Reading[None]:
        source = self.source
        before = yield from source.space()
        while True:
            if (yield from source.peek()) == "{":
                source.mark()
                call = JsonCall(self, known_only=True)
                if (yield from call.read()):
                    if not call.complete and not (yield from source.peek()):
                        return  # cut off
                    self.end()
                    before = yield from source.space()
                    if (yield from source.one_of(";")) is not None:
                        before = yield from source.space()
                    continue
                source.rewind()
            self.content(before)
            marker = yield from source.until(BEGIN, self.content)
            if marker is None:
                return
            before = ""
            if marker == PYTHON_TAG:
                yield from source.space()
            else:
                source.unread("{")
                before = "\n"
