"""JSON from a model, as it comes, to JSON that a client can parse; Python's literals too.

Valid JSON goes through character by character. What models get wrong and has one meaning only is put right on the
way: raw line ends and tabs in strings, unknown escapes, commas before a closing bracket, single or triple quotes,
True, False and None, tuples. What has been passed on is the begin of valid JSON, as long as the model's text can be
read that way.
"""

from __future__ import annotations

import json
import re

from tokenspeed.text.parsers.source import Emit, Plain, Reading, Source

WORDS = {"True": "true", "False": "false", "None": "null"}
CLOSING = {"{": "}", "[": "]", "(": ")"}
OUT = {"(": "[", ")": "]"}
ESCAPES = {"a": "\\u0007", "v": "\\u000b", "0": "\\u0000", "'": "'", "\n": ""}
LEADING_ZERO = re.compile(r"[+-]?0[\d_]")
HEX = {"u": 4, "x": 2, "U": 8}

PLAIN = re.compile(r"[^\"'\\\x00-\x1f]+")
IN_STRING = Plain('"\\' + "".join(map(chr, range(32))), escapes=True)
"""What stands in a string in double quotes as it would in JSON."""
BETWEEN = re.compile(r"[\s:]+")
WORD = re.compile(r"[\w.+-]+")
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)

MAX_WORD = 512
"""No number or word is longer: beyond this it is passed on as it comes."""


def literal(source: Source, emit: Emit) -> Reading[bool]:
    """Pass one value to `emit` as JSON. True when it is complete.

    False at the end of the text, or at a character that cannot belong to a value, which is not read.
    """
    open_brackets: list[str] = []
    comma = ""
    while True:
        head = yield from source.peek()
        if not head:
            return False
        if open_brackets and head == CLOSING[open_brackets[-1]]:
            source.skip()
            emit(OUT.get(head, head))
            open_brackets.pop()
            comma = ""
        elif open_brackets and (head.isspace() or head in ":,"):
            comma = _between(source, head, comma, emit)
        else:
            emit(comma)
            comma = ""
            if head in CLOSING:
                source.skip()
                emit(OUT.get(head, head))
                open_brackets.append(head)
            elif not (yield from (string if head in "\"'" else _word)(source, emit)):
                return False
        if not open_brackets:
            return True


def _between(source: Source, head: str, comma: str, emit: Emit) -> str:
    """Read what separates values; a comma, and the space behind it, waits until another value follows."""
    if head == ",":
        source.skip()
        return ","
    space = source.run(BETWEEN)
    if comma:
        return comma + space
    emit(space)
    return ""


def _word(source: Source, emit: Emit) -> Reading[bool]:
    word = yield from source.whole(WORD, MAX_WORD)
    if not word:
        return False
    emit(WORDS.get(word) or (word if NUMBER.fullmatch(word) else _odd_number(word)))
    return True


def _odd_number(word: str) -> str:
    """Numbers that only Python writes (1_000, 0x1f, .5, 1.) as JSON writes them; other words, 007 too, as they are."""
    if LEADING_ZERO.match(word):
        return word
    try:
        return str(int(word, 0))
    except ValueError:
        pass
    try:
        value = float(word)
    except ValueError:
        return word
    return repr(value) if abs(value) < float("inf") else word


def string(source: Source, emit: Emit) -> Reading[bool]:
    """Pass one string in any quotes to `emit`, in JSON's, a part at a time; True when it is complete."""
    quote = yield from source.peek()
    source.skip()
    triple = (yield from source.one_of(quote * 2)) is not None
    emit('"')
    passing = (IN_STRING, emit) if quote == '"' and not triple else None
    while True:
        if plain := source.run(PLAIN):
            emit(plain)
        while source.waits:
            yield passing
        head = yield from source.peek()
        if not head:
            return False
        if head == "\\":
            if escape := (yield from _escape(source)):
                emit(escape)
        elif head == quote and (not triple or (yield from source.ahead(3)) == quote * 3):
            source.skip(3 if triple else 1)
            emit('"')
            return True
        elif head in "\"'" or head < " ":
            source.skip()
            emit(json.dumps(head)[1:-1])


def _escape(source: Source) -> Reading[str]:
    r"""The escape that begins here, as JSON has it; "" for none, or for one that the end cuts off."""
    two = yield from source.ahead(2)
    if len(two) < 2:
        source.skip(len(two))
        return ""
    kind = two[1]
    if kind in HEX:
        size = 2 + HEX[kind]
        escape = yield from source.ahead(size)
        digits = escape[2:]
        if len(escape) < size and all(digit in "0123456789abcdefABCDEF" for digit in digits):
            source.skip(len(escape))
            return ""
        if re.fullmatch(r"[0-9a-fA-F]+", digits) and (kind != "U" or int(digits, 16) < 0x110000):
            source.skip(size)
            return escape if kind == "u" else json.dumps(chr(int(digits, 16)))[1:-1]
    source.skip(2)
    if kind in '"\\/bfnrt':
        return two
    return ESCAPES[kind] if kind in ESCAPES else json.dumps(two)[1:-1]


def string_value(source: Source) -> Reading[str | None]:
    """The characters of one string, None if it does not end."""
    parts: list[str] = []
    if not (yield from string(source, parts.append)):
        return None
    return _decoded("".join(parts))


def _decoded(text: str) -> str:
    """The characters of a JSON string; half a surrogate pair, which nobody could encode, becomes a question mark."""
    return str(json.loads(text)).encode("utf-8", "replace").decode()


def arguments(source: Source, emit: Emit) -> Reading[bool]:
    """Pass the arguments of a call to `emit`: an object, or one that the model has put into a string.

    null, for none, gives nothing. True and False as from `literal`.
    """
    if (yield from source.peek()) in ("{", "["):
        return (yield from literal(source, emit))
    held: list[str] = []
    complete = yield from literal(source, held.append)
    text = "".join(held)
    if complete and text.startswith('"'):
        inner = _decoded(text).strip()
        text = inner if inner.startswith("{") else text
    if text != "null":
        emit(text)
    return complete


def as_json(text: str) -> str | None:
    """A whole text as one JSON value, None if it is not one."""
    source = Source.of_all(text.strip())
    made: list[str] = []
    try:
        next(literal(source, made.append))
    except StopIteration as done:
        if done.value and source.exhausted:
            return "".join(made)
    return None
