"""Text that comes in pieces, read as if it were whole.

A format is read by generators that look at a `Source` and `yield` where what has come does not decide yet. They
are resumed with more text, or with the knowledge that there is none. Every question here is answered only when no
further text could change the answer, so that the borders of the pieces leave no trace.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Self, TypeVar

T = TypeVar("T")

Emit = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Plain:
    """Text without any of the characters `but`. With `escapes` those of complete escapes of JSON do not count."""

    but: str = ""
    escapes: bool = False

    def allows(self, text: str) -> bool:
        """Whether all of `text` is so plain."""
        return set(self.but).isdisjoint(well_escaped(text) if self.escapes else text)


Reading = Generator[tuple[Plain, Emit] | None, None, T]
"""A reader in progress: yields to wait for text, returns what it found.

It may say of what text it would do nothing but pass it on, and to whom: such text need not be shown to it.
"""

ANYTHING = Plain()
ESCAPE = re.compile(r'\\["\\/bfnrt]')

SPACE = re.compile(r"\s*")
LINE_ENDS = re.compile(r"[\r\n]*")


class Markers:
    """Literal strings to look for; the leftmost one is found.

    None may begin another or lie inside another, or what is found would depend on how much text has come. One
    that ends another is fine: the longer of them is found.
    """

    def __init__(self, *texts: str) -> None:
        for text in texts:
            inside = [other for other in texts if other != text and text in other and not other.endswith(text)]
            assert not inside, f"the marker {text!r} lies inside {inside[0]!r}"
        self.texts = texts
        self.search = re.compile("|".join(re.escape(text) for text in texts)).search
        self._begun = {text[:size] for text in texts for size in range(1, len(text))}
        self._first = {text[0] for text in texts}
        self.plain = Plain("".join(sorted(self._first)))
        self._longest = max(len(text) for text in texts) - 1

    def held(self, text: str, start: int) -> int:
        """How many characters at the end of `text[start:]` may be the begin of a marker."""
        tail = text[max(start, len(text) - self._longest) :]
        if self._first.isdisjoint(tail):
            return 0
        return next((size for size in range(len(tail), 0, -1) if tail[-size:] in self._begun), 0)


class Source:
    """The text that has come and is not read yet. `ended`: no more will come."""

    def __init__(self) -> None:
        self.ended = False
        self._text = ""
        self._at = 0
        self._mark: int | None = None
        self._kept: list[str] = []

    @classmethod
    def of_all(cls, text: str) -> Self:
        """A text of which no more will come."""
        source = cls()
        source.append(text)
        source.ended = True
        return source

    def append(self, text: str) -> None:
        """More text. What has been read is forgotten, or kept apart if it is marked: each piece costs its own size."""
        if self._mark is not None:
            self._kept.append(self._text[self._mark : self._at])
            self._mark = 0
        self._text = self._text[self._at :] + text
        self._at = 0

    @property
    def waits(self) -> bool:
        """All that has come has been read, and more may come."""
        return self._at == len(self._text) and not self.ended

    @property
    def marked(self) -> bool:
        """Whether what is being read may be read again."""
        return self._mark is not None

    @property
    def exhausted(self) -> bool:
        """All has been read and no more will come."""
        return self.ended and self._at == len(self._text)

    # To try, and to take back ------------------------------------------------------------------------

    def mark(self) -> None:
        """Remember this place for `rewind`, until `release`."""
        self._mark = self._at

    def release(self) -> None:
        """What has been read stays read."""
        self._mark = None
        self._kept.clear()

    def rewind(self) -> None:
        """Back to the mark, as if nothing had been read since."""
        assert self._mark is not None
        if self._kept:
            self._text = "".join(self._kept) + self._text[self._mark :]
            self._mark = 0
        self._at = self._mark
        self.release()

    def unread(self, text: str) -> None:
        """Put back what was read last, without having waited since."""
        self._at -= len(text)

    # To read -----------------------------------------------------------------------------------------

    def peek(self) -> Reading[str]:
        """The next character, "" at the end."""
        while self._at == len(self._text) and not self.ended:
            yield None
        return self._text[self._at : self._at + 1]

    def ahead(self, count: int) -> Reading[str]:
        """The next `count` characters, fewer only at the end."""
        while len(self._text) - self._at < count and not self.ended:
            yield None
        return self._text[self._at : self._at + count]

    def skip(self, count: int = 1) -> None:
        """Past characters that have been looked at."""
        self._at += count

    def run(self, pattern: re.Pattern[str]) -> str:
        """What `pattern` matches here of the text that has come, "" if nothing; never waits."""
        found = pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found.group()

    def whole(self, pattern: re.Pattern[str], limit: int) -> Reading[str]:
        """The longest run that `pattern`, a repeated class, matches here: its first `limit` characters."""
        runs = ""
        while len(runs) < limit and (yield from self.peek()) and (run := self.run(pattern)):
            runs += run
        self._at -= max(0, len(runs) - limit)
        return runs[:limit]

    def space(self, kind: re.Pattern[str] = SPACE) -> Reading[str]:
        """White space, of this kind, up to other text or the end."""
        runs = ""
        while True:
            runs += self.run(kind)
            if self._at < len(self._text) or self.ended:
                return runs
            yield None

    def one_of(self, *texts: str) -> Reading[str | None]:
        """Which of `texts`, none the begin of another, stands here; it is read. None if none does."""
        longest = max(map(len, texts))
        while True:
            rest = self._text[self._at : self._at + longest]
            for text in texts:
                if rest.startswith(text):
                    self._at += len(text)
                    return text
            if self.ended or not any(text.startswith(rest) for text in texts):
                return None
            yield None

    def until(self, markers: Markers, emit: Emit, limit: int = sys.maxsize) -> Reading[str | None]:
        """Pass text to `emit` up to the first marker, which is read and returned; None at the end.

        All is passed on at once but an end that may become a marker. None, too, where none comes within `limit`
        characters; how much has then been passed on depends on how the text was cut.
        """
        size = 0
        while True:
            found = markers.search(self._text, self._at)
            if found is not None:
                start, end = found.span()
            else:
                start = end = len(self._text) - (0 if self.ended else markers.held(self._text, self._at))
            size += start - self._at
            if size > limit:
                return None
            if start > self._at:
                emit(self._text[self._at : start])
            self._at = end
            if found is not None:
                return found.group()
            if self.ended:
                return None
            yield (markers.plain, emit) if self.waits and limit == sys.maxsize else None

    def rest(self, emit: Emit) -> Reading[None]:
        """Pass on everything to the end."""
        while True:
            if self._at < len(self._text):
                emit(self._text[self._at :])
                self._at = len(self._text)
            if self.ended:
                return
            yield ANYTHING, emit


def well_escaped(text: str) -> str:
    """A text without those escapes of JSON that are complete in it, \\u ones aside."""
    return ESCAPE.sub("", text)
