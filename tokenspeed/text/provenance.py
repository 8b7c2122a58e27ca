"""Strings that remember, character by character, whether a template or a request wrote them.

A chat template is a program that cuts, joins, strips and rewrites strings. `Text` is a `str` that does all
of that and carries along where each character came from. Whatever loses the trail counts as request text:
a plain `str` that meets a `Text` is taken to come from the request, and so is every result whose characters
cannot be told apart. A mistake here therefore costs a control token of the template, never gives one to a
request.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, SupportsIndex

from markupsafe import Markup

from tokenspeed.text.written import WrittenArray, WrittenObject

TEMPLATE, REQUEST, MARK = b"\0", b"\1", b"\2"
"""One byte a character. MARK is request text too; it shows where a message that is to be continued ends."""

MAX_CHARACTERS = 1 << 24
"""The longest string a template may build; far above any prompt that fits a context."""


class Text(str):
    """A string with the origin of every character. Compares, hashes and searches as the plain string."""

    __slots__ = ("_origin",)
    _origin: bytes

    def __str__(self) -> Text:
        return self

    def __add__(self, other: object) -> Text:
        if not isinstance(other, str) or isinstance(other, Markup):
            return NotImplemented
        check_size(len(self) + len(other))
        return text(str.__add__(self, other), self._origin + origin(other))

    def __radd__(self, other: object) -> Text:
        if not isinstance(other, str) or isinstance(other, Markup):
            return NotImplemented
        check_size(len(self) + len(other))
        return text(str.__add__(other, self), origin(other) + self._origin)

    def __mul__(self, count: SupportsIndex) -> Text:
        check_size(len(self) * max(0, count.__index__()))
        return text(str.__mul__(self, count), self._origin * count.__index__())

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Text:
        return _percent(self, values)

    def __getitem__(self, key: SupportsIndex | slice) -> Text:
        if isinstance(key, slice):
            return text(str.__getitem__(self, key), self._origin[key])
        return text(str.__getitem__(self, key), bytes((self._origin[key],)))

    def __iter__(self) -> Iterator[Text]:
        for character, source in zip(str.__iter__(self), self._origin, strict=True):
            yield text(character, bytes((source,)))

    def join(self, parts: Iterable[str], /) -> Text:
        parts = list(parts)
        check_size(sum([len(part) for part in parts]) + len(self) * len(parts))
        return text(str.join(self, parts), self._origin.join([origin(part) for part in parts]))

    def replace(self, old: str, new: str, /, count: SupportsIndex = -1) -> Text:
        """As `str.replace`. New text counts as the template's only where the text it replaces did.

        Whoever writes the old text decides whether and how often the new one appears.
        """
        if not old:
            return blurred(str.replace(self, old, new, count), [self, new])
        left = count.__index__()
        check_size(len(self) + str.count(self, old) * len(new))
        fresh, taken = origin(new), REQUEST * len(new)
        pieces: list[bytes] = []
        at = 0
        while left and (found := str.find(self, old, at)) >= 0:
            end = found + len(old)
            pieces += (self._origin[at:found], taken if self._origin[found:end].strip(TEMPLATE) else fresh)
            at, left = end, left - 1
        pieces.append(self._origin[at:])
        return text(str.replace(self, old, new, count), b"".join(pieces))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Text]:  # type: ignore[override]
        return _located(self, str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Text]:  # type: ignore[override]
        return _located(self, str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[Text]:  # type: ignore[override]
        lines: list[Text] = []
        at = 0
        for line, full in zip(str.splitlines(self, keepends), str.splitlines(self, True), strict=True):
            lines.append(text(line, self._origin[at : at + len(line)]))
            at += len(full)
        return lines

    def partition(self, sep: str, /) -> tuple[Text, Text, Text]:
        return _thirds(self, str.partition(self, sep))

    def rpartition(self, sep: str, /) -> tuple[Text, Text, Text]:
        return _thirds(self, str.rpartition(self, sep))

    def strip(self, chars: str | None = None, /) -> Text:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Text:
        rest = str.lstrip(self, chars)
        return text(rest, self._origin[len(self) - len(rest) :])

    def rstrip(self, chars: str | None = None, /) -> Text:
        rest = str.rstrip(self, chars)
        return text(rest, self._origin[: len(rest)])

    def removeprefix(self, prefix: str, /) -> Text:
        rest = str.removeprefix(self, prefix)
        return text(rest, self._origin[len(self) - len(rest) :])

    def removesuffix(self, suffix: str, /) -> Text:
        rest = str.removesuffix(self, suffix)
        return text(rest, self._origin[: len(rest)])

    def lower(self) -> Text:
        return _recased(self, str.lower)

    def upper(self) -> Text:
        return _recased(self, str.upper)

    def casefold(self) -> Text:
        return _recased(self, str.casefold)

    def swapcase(self) -> Text:
        return _recased(self, str.swapcase)

    def title(self) -> Text:
        return _recased(self, str.title)

    def capitalize(self) -> Text:
        return _recased(self, str.capitalize)

    def translate(self, table: Any, /) -> Text:
        """As `str.translate`; what a character is replaced by counts as in `replace`."""
        parts: list[str] = []
        for character in self:
            part = str.translate(character, table)
            if part == character:
                parts.append(character)
            elif part:
                new = table[ord(character)]
                parts.append(new if isinstance(new, Text) and is_templates(character) else from_request(part))
        return concatenated(parts)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> Text:
        size = tabsize.__index__()
        parts: list[str] = []
        column = 0
        for character in str.__iter__(self):
            part = character
            if character == "\t":
                width = size - column % size if size > 0 else 0
                check_size(width)
                part = " " * width
            column = 0 if character in "\r\n" else column + len(part)
            parts.append(part)
        return text(str.expandtabs(self, size), _stretched(self._origin, parts))

    def center(self, width: SupportsIndex, fillchar: str = " ", /) -> Text:
        missing = max(0, width.__index__() - len(self))
        left = missing // 2 + (missing & width.__index__() & 1)
        return _padded(self, fillchar, left, missing - left)

    def ljust(self, width: SupportsIndex, fillchar: str = " ", /) -> Text:
        return _padded(self, fillchar, 0, max(0, width.__index__() - len(self)))

    def rjust(self, width: SupportsIndex, fillchar: str = " ", /) -> Text:
        return _padded(self, fillchar, max(0, width.__index__() - len(self)), 0)

    def zfill(self, width: SupportsIndex, /) -> Text:
        check_size(width.__index__())
        return blurred(str.zfill(self, width), [self])


def text(value: str, source: bytes) -> Text:
    """A `Text` of these characters; `source` is TEMPLATE, REQUEST or MARK for each."""
    made = str.__new__(Text, value)
    made._origin = source
    return made


def from_template(value: str) -> Text:
    """A string that the template itself wrote."""
    return text(value, TEMPLATE * len(value))


def from_request(value: str) -> Text:
    """A string that a request brought."""
    return text(value, REQUEST * len(value))


def origin(value: str) -> bytes:
    """The origin of each character; a plain string is a request's."""
    return value._origin if isinstance(value, Text) else REQUEST * len(value)


def is_templates(value: object) -> bool:
    """True for a string whose every character the template wrote."""
    return isinstance(value, Text) and not value._origin.strip(TEMPLATE)


def runs(value: Text) -> Iterator[tuple[str, bool]]:
    """The longest stretches of one origin: (text, came from the request)."""
    source = value._origin
    plain = str.__add__("", value)
    for run in re.finditer(rb"\0+|[^\0]+", source):
        start, end = run.span()
        yield plain[start:end], source[start] != TEMPLATE[0]


def public(value: object) -> str:
    """What may be repeated in an error message: the template's own words, "…" for what a request brought."""
    if not isinstance(value, Text):
        return "…"
    return "".join(["…" if requested else run for run, requested in runs(value)])


def concatenated(parts: Iterable[str]) -> Text:
    """The parts joined; `OverflowError` as soon as they are longer than `MAX_CHARACTERS`."""
    kept: list[str] = []
    size = 0
    for part in parts:
        size += len(part)
        check_size(size)
        kept.append(part)
    return text("".join(kept), b"".join([origin(part) for part in kept]))


def check_size(size: int) -> None:
    """Raise `OverflowError` for a string longer than a template may build."""
    if size > MAX_CHARACTERS:
        raise OverflowError(f"a chat template may build strings of at most {MAX_CHARACTERS} characters")


def blurred(value: str, sources: Iterable[object]) -> Text:
    """A result in which characters cannot be told apart: the template's only if all that went in was."""
    return from_template(value) if all(is_templates(source) for source in sources) else from_request(value)


def _located(whole: Text, parts: list[str], sep: str | None) -> list[Text]:
    located: list[Text] = []
    at = 0
    for part in parts:
        if sep is None:
            at = str.find(whole, part, at)
        located.append(text(part, whole._origin[at : at + len(part)]))
        at += len(part) + (0 if sep is None else len(sep))
    return located


def _thirds(whole: Text, parts: tuple[str, str, str]) -> tuple[Text, Text, Text]:
    first, second = len(parts[0]), len(parts[0]) + len(parts[1])
    source = whole._origin
    return text(parts[0], source[:first]), text(parts[1], source[first:second]), text(parts[2], source[second:])


def _recased(value: Text, change: Callable[[str], str]) -> Text:
    changed = change(value)
    if len(changed) == len(value):
        return text(changed, value._origin)
    # Only ever longer, as "ß" to "SS".
    parts = [change(character) for character in str.__iter__(value)]
    if sum(map(len, parts)) == len(changed):
        return text(changed, _stretched(value._origin, parts))
    return blurred(changed, [value])


def _stretched(source: bytes, parts: list[str]) -> bytes:
    """Origins after each character became the part of the same index."""
    return b"".join([source[index : index + 1] * len(part) for index, part in enumerate(parts)])


def _padded(value: Text, fill: str, left: int, right: int) -> Text:
    if len(fill) != 1:
        raise TypeError("The fill character must be exactly one character long")
    check_size(left + len(value) + right)
    before, after = fill * left, fill * right
    return concatenated([before, value, after])


PERCENT = re.compile(
    r"%(?:\((?P<key>[^()]*)\))?(?P<flags>[#0\- +]*)(?P<width>\d*)(?:\.(?P<precision>\d*))?(?P<kind>.)", re.DOTALL
)


def _percent(pattern: Text, values: Any) -> Text:
    """`pattern % values`; the arguments keep their origin where the pattern is the template's own."""
    specs = list(PERCENT.finditer(pattern))
    for spec in specs:
        check_size(int(spec["width"] or 0))
        check_size(int(spec["precision"] or 0))
    whole = str.__mod__(pattern, values)
    if not is_templates(pattern) or any(spec["kind"] not in "diouxXeEfFgGcrsa%" for spec in specs):
        return from_request(whole)
    rest = list(values) if isinstance(values, tuple) else [values]
    parts: list[str] = []
    at = 0
    for spec in specs:
        parts.append(pattern[at : spec.start()])
        at = spec.end()
        if spec["kind"] == "%":
            parts.append(from_template("%"))
            continue
        value = values[spec["key"]] if spec["key"] is not None else rest.pop(0)
        if spec["kind"] == "s" and isinstance(value, Text) and not spec["width"] and spec["precision"] is None:
            parts.append(value)
        else:
            shown = str.__mod__(f"%{spec['flags']}{spec['width']}{_dotted(spec['precision'])}{spec['kind']}", (value,))
            parts.append(blurred(shown, [value]))
    made = concatenated([*parts, pattern[at:]])
    return made if str.__eq__(made, whole) else from_request(whole)


def _dotted(precision: str | None) -> str:
    return "" if precision is None else f".{precision}"


def converted(value: Any, wrap: Callable[[str], Text] = from_request) -> Any:
    """JSON-like data with every string, keys too, made a `Text`; one that is keeps its origin.

    Raises `TypeError` for anything else.
    """
    if isinstance(value, str):
        return value if isinstance(value, Text) else wrap(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, dict) or isinstance(value, Mapping):  # noqa: SIM101  (asking an ABC first costs more)
        members = {converted(key, wrap): converted(item, wrap) for key, item in value.items()}
        return WrittenObject(members, value.written_as) if isinstance(value, WrittenObject) else members
    if isinstance(value, (list, tuple)):
        items = [converted(item, wrap) for item in value]
        return WrittenArray(items, value.written_as) if isinstance(value, WrittenArray) else items
    raise TypeError(f"a template cannot be given a {type(value).__name__}")
