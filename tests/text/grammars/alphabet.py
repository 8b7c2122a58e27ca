"""A vocabulary of bytes and of the marks of all formats, and random texts of a grammar, written token by token."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np

from tokenspeed.text.grammars.binding import Compiled, Compiler
from tokenspeed.text.grammars.judge import with_schemas
from tokenspeed.text.grammars.vocabulary import Vocabulary
from tokenspeed.text.parsers.choose import REASONING_PARSERS, TOOL_PARSERS

MARKS = sorted(
    {mark for thinking in REASONING_PARSERS.values() for mark in thinking.marks}
    | {mark for parser in TOOL_PARSERS.values() for mark in parser.markers}
)
TOKENS = [*(bytes([byte]) for byte in range(256)), b"tool", b'": ', b"\n\n", *(mark.encode() for mark in MARKS)]
END = len(TOKENS)
"""The one token without a text."""

CLOSERS = {b'"', b"}", b")", b"]", b",", b"<", b"/"}
"""Drawn often, or random texts would seldom end."""

VOCABULARY = Vocabulary(
    END + 1, END, b"".join(TOKENS), np.array([*map(len, TOKENS), 0], dtype="<i4").tobytes()
)
COMPILER = Compiler(VOCABULARY, cache_bytes=64 << 20)


def compiled(format: dict[str, Any]) -> Compiled:
    return COMPILER.compile(COMPILER.parse(with_schemas(format)))


def matches(grammar: Compiled, text: str) -> bool:
    """Whether a text is one of the grammar's, whole."""
    matcher = grammar.matcher({END})
    return all(matcher.accept(byte) for byte in text.encode()) and matcher.completed


def accepts(grammar: Compiled, value: Any) -> bool:
    """Whether JSON of a value is one of the grammar's texts."""
    return matches(grammar, json.dumps(value, separators=(",", ":"), ensure_ascii=False))


SURROGATES = 0xED
"""A byte that is left out: with it xgrammar allows characters that UTF-8 does not have."""


def random_text(grammar: Compiled, seed: int, begin: str = "", longest: int = 3000) -> str | None:
    """A text that begins like this and that the masks allow, None if it has not ended after `longest` tokens."""
    draw, matcher, text = random.Random(seed), grammar.matcher({END}), begin.encode()
    assert all(map(matcher.accept, text))
    for _ in range(longest):
        if matcher.ended:
            return text.decode("utf-8", "replace")
        allowed = np.flatnonzero(np.unpackbits(matcher.mask.view(np.uint8), bitorder="little")[: END + 1]).tolist()
        assert allowed, f"nothing may follow {text!r}"
        allowed = [token for token in allowed if token != SURROGATES] or allowed
        closing = [token for token in allowed if token < END and TOKENS[token] in CLOSERS]
        token = draw.choice(closing if closing and draw.random() < 0.4 else allowed)
        if token == END:
            return text.decode("utf-8", "replace")
        assert matcher.accept(token)
        text += TOKENS[token]
    return None
