"""DeepSeek and Kimi: JSON arguments behind a header, each call between two special tokens, all calls in a section.

The two differ in their tokens and in how the header names the tool: a `Layout`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from tokenspeed.text.parsers.literals import arguments
from tokenspeed.text.parsers.source import Markers, Reading
from tokenspeed.text.parsers.tool_parser import MAX_NAME, ToolParser

LEFT_OVER = re.compile(r"[\s`}\]]+")
MAX_HEADER = MAX_NAME + 128


@dataclass(frozen=True)
class Layout:
    """`header` matches all between the token `begin` and the arguments, and has the groups `name` and perhaps `id`.

    `opening` and `closing` have the tokens around all calls, in all their spellings; `inner` has those in the header.
    `numbered`: ids are functions.NAME:INDEX.
    """

    opening: tuple[str, ...]
    closing: tuple[str, ...]
    begin: str
    header: re.Pattern[str]
    end: str
    inner: tuple[str, ...] = ()
    numbered: bool = False

    @property
    def begins(self) -> tuple[str, ...]:
        """The tokens with which calls may begin."""
        return (*self.opening, self.begin)

    @cached_property
    def markers(self) -> Markers:
        """Every token of the format."""
        return Markers(*self.begins, *self.closing, self.end, *self.inner)

    @cached_property
    def header_end(self) -> Markers:
        """What ends a header: arguments, or the end of a call that has none."""
        return Markers("{", self.end)

    @cached_property
    def call_end(self) -> Markers:
        """What ends a call."""
        return Markers(self.end)


DEEPSEEK = Layout(
    opening=("<｜tool▁calls▁begin｜>",),
    closing=("<｜tool▁calls▁end｜>",),
    begin="<｜tool▁call▁begin｜>",
    # V3 and R1: function<sep>NAME, then the arguments in a fenced block. V3.1: NAME<sep>, then the bare arguments.
    header=re.compile(
        r"\s*(?:function<｜tool▁sep｜>)?(?P<name>[^\s<`]+)\s*(?:<｜tool▁sep｜>)?\s*(?:```\s*(?:json)?)?\s*"
    ),
    end="<｜tool▁call▁end｜>",
    inner=("<｜tool▁sep｜>",),
)

KIMI_K2 = Layout(
    opening=("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>"),
    closing=("<|tool_calls_section_end|>", "<|tool_call_section_end|>"),
    begin="<|tool_call_begin|>",
    header=re.compile(
        r"\s*(?:(?P<id>functions\.(?P<name>[^\s<]+?):\d+)|(?:functions\.)?(?P<bare>[^\s<]+?)(?::\d+)?)"
        r"\s*(?:<\|tool_call_argument_begin\|>)?\s*"
    ),
    end="<|tool_call_end|>",
    inner=("<|tool_call_argument_begin|>",),
    numbered=True,
)


class SectionedParser(ToolParser):
    """Calls as a `layout` says. Its tokens are never content, wherever they stand."""

    layout: ClassVar[Layout]

    def _read(self) -> Reading[None]:
        source = self.source
        while (marker := (yield from source.until(self.layout.markers, self.content))) is not None:
            if marker == self.layout.begin:
                source.mark()
                if not (yield from self._call()):
                    source.rewind()
            yield from source.space()

    def _call(self) -> Reading[bool]:
        source = self.source
        header: list[str] = []
        marker = yield from source.until(self.layout.header_end, header.append, MAX_HEADER)
        found = self.layout.header.fullmatch("".join(header))
        if found is None or marker is None:
            return False
        groups = found.groupdict()
        name = groups["name"] or groups["bare"]
        source.release()
        self.begin(name, groups.get("id"))
        if marker == self.layout.end:
            self.end()
            return True
        source.unread(marker)
        if not (yield from arguments(source, self.argue)):
            marker = yield from source.until(self.layout.call_end, self.argue)
        else:
            while (yield from source.peek()) and source.run(LEFT_OVER):
                pass
            marker = yield from source.one_of(self.layout.end)
        if marker is not None or (yield from source.peek()):
            self.end()
        return True

    def call_id(self, name: str, index: int) -> str:
        return f"functions.{name}:{index}" if self.layout.numbered else super().call_id(name, index)


class DeepSeekParser(SectionedParser):
    """DeepSeek V3, R1 and V3.1."""

    layout = DEEPSEEK
    markers = DEEPSEEK.markers.texts


class KimiK2Parser(SectionedParser):
    """Kimi K2 and its successors."""

    layout = KIMI_K2
    markers = KIMI_K2.markers.texts
