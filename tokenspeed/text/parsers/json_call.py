"""One call as a JSON object: {"name": …, "arguments": {…}}, its keys in any order and under any of their names."""

from __future__ import annotations

from tokenspeed.text.parsers.literals import arguments, literal, string_value
from tokenspeed.text.parsers.source import Markers, Reading
from tokenspeed.text.parsers.tool_parser import MAX_NAME, ToolParser

NAME, ARGUMENTS, ASIDE = ("name", "function"), ("arguments", "parameters"), ("type", "id")


class JsonCall:
    """Reads one object and begins, fills and leaves open a call of `parser`.

    `known_only`: whatever does not begin like a call of one of the request's tools is none. `end`: what ends a call,
    up to which arguments that are no JSON are passed on as they are.
    """

    def __init__(self, parser: ToolParser, *, known_only: bool = False, end: Markers | None = None) -> None:
        self._parser = parser
        self._source = parser.source
        self._known_only = known_only
        self._end = end
        self._begun = False
        self._early: list[str] = []
        self._argued = False
        self.complete = False
        """The object has been read to its closing bracket."""
        self.at_end = False
        """The `end` has been read."""

    def read(self) -> Reading[bool]:
        """True if the object was a call, as far as it went; False leaves the source anywhere."""
        source = self._source
        yield from source.space()
        if (yield from source.one_of("{")) is None:
            return False
        depth = 1
        while depth:
            yield from source.space()
            head = yield from source.peek()
            if head in ("}", ","):
                source.skip()
                depth -= head == "}"
                continue
            key = (yield from string_value(source)) if head in ("'", '"') else None
            if key is None:
                break
            yield from source.space()
            if (yield from source.one_of(":")) is None:
                break
            yield from source.space()
            head = yield from source.peek()
            if key == "function" and head == "{":  # the call inside {"type": "function", "function": {…}}
                source.skip()
                depth += 1
            elif not (yield from self._field(key, head)):
                break
        self.complete = depth == 0
        return self._begun

    def _field(self, key: str, head: str) -> Reading[bool]:
        """Read the value of one key, which begins with `head`; False if the object cannot go on."""
        if key in NAME and not self._begun:
            name = (yield from string_value(self._source)) if head in ("'", '"') else None
            return name is not None and self._begin(name)
        if key in ARGUMENTS and not self._argued:
            self._argued = True
            emit = self._parser.argue if self._begun else self._early.append
            if (yield from arguments(self._source, emit)):
                return True
            if self._begun and self._end is not None:
                self.at_end = (yield from self._source.until(self._end, emit)) is not None
            return False
        if self._known_only and not self._begun and key not in ASIDE:
            return False
        return (yield from literal(self._source, len))

    def _begin(self, name: str) -> bool:
        known = name in self._parser.tools if self._known_only else 0 < len(name) <= MAX_NAME
        if known:
            self._begun = True
            self._source.release()
            self._parser.begin(name)
            self._parser.argue("".join(self._early))
        return known
