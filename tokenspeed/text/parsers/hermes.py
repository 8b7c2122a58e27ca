"""Hermes and Qwen: JSON objects between <tool_call> and </tool_call>."""

from __future__ import annotations

import re

from tokenspeed.text.parsers.json_call import JsonCall
from tokenspeed.text.parsers.source import Markers, Reading
from tokenspeed.text.parsers.tool_parser import ToolParser

OPENING, CLOSING = "<tool_call>", "</tool_call>"
# The templates write a line end before a call; with it taken away, content is rendered again as it was generated.
BEGIN = Markers("\n" + OPENING, OPENING)
END = Markers(CLOSING)
LEFT_OVER = re.compile(r"[\s}\]]+")
"""Brackets too many, which Qwen writes at times."""


class HermesParser(ToolParser):
    """<tool_call>{"name": …, "arguments": {…}}</tool_call>, any number of times, between content."""

    markers = (OPENING, CLOSING)

    def _read(self) -> Reading[None]:
        source = self.source
        while (marker := (yield from source.until(BEGIN, self.content))) is not None:
            source.mark()
            call = JsonCall(self, end=END)
            if not (yield from call.read()):
                source.rewind()
                self.content(marker)
                continue
            if not call.at_end:
                while (yield from source.peek()) and source.run(LEFT_OVER):
                    pass
                if not call.complete and not (yield from source.peek()):
                    return  # cut off
                yield from source.one_of(CLOSING)
            self.end()
            yield from source.space()
