"""Whether a grammar can be compiled and followed: all the work that a hostile one can draw out, in one call."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from tokenspeed.request import Grammar
from tokenspeed.text.grammars.binding import Compiled, Compiler, GrammarError, Matcher
from tokenspeed.text.grammars.formats import Format, as_format
from tokenspeed.text.grammars.json_schema import compilable

MAX_RULES_BYTES = 16 << 20
MAX_MASK_BYTES = 64 << 20
TRIED_TOKENS = 24
"""Tokens of a random text that the grammar is followed along, so that what only fails then fails here."""


def judged(compiler: Compiler, grammar: Grammar) -> str:
    """The rules of a grammar, for `Compiler.compile`. Raises `GrammarError` if it is none, or too large."""
    try:
        format = as_format(grammar)
    except (ValueError, RecursionError) as error:
        raise GrammarError(str(error) if type(error) is ValueError else "is not valid JSON") from None
    rules = compiler.parse(with_schemas(format))
    if len(rules) > MAX_RULES_BYTES:
        raise GrammarError("is too large once it is spelled out as rules")
    _try(compiler.compile(rules))
    return rules


def with_schemas(format: Format) -> Format:
    """The same format, its schemas in the words that xgrammar knows."""
    made = dict(format)
    if made.get("type") == "json_schema":
        strict, about = made.pop("strict", True), made.pop("about", "")
        try:
            made["json_schema"] = compilable(made.get("json_schema"), strict=strict)
        except GrammarError as error:
            raise GrammarError(f"{about}: {error}" if about else str(error)) from None
    for key in ("content", "format"):
        if isinstance(made.get(key), dict):
            made[key] = with_schemas(made[key])
    for key in ("elements", "tags"):
        if isinstance(made.get(key), list):
            made[key] = [with_schemas(item) if isinstance(item, dict) else item for item in made[key]]
    return made


def _try(compiled: Compiled) -> None:
    if compiled.num_bytes > MAX_MASK_BYTES:
        raise GrammarError("is too large: its states have masks of more than 64 MiB")
    matcher = compiled.matcher(set())
    if matcher.ended or not matcher.mask.any():
        raise GrammarError("matches no text")
    draw = random.Random(0)
    for _ in range(TRIED_TOKENS):
        if matcher.ended or not _step(matcher, draw):
            return


def _step(matcher: Matcher, draw: random.Random) -> bool:
    words: Any = np.flatnonzero(matcher.mask)
    if not len(words):
        return False
    word = int(draw.choice(words))
    bits = int(matcher.mask[word]) & 0xFFFFFFFF
    return matcher.accept(word * 32 + draw.choice([bit for bit in range(32) if bits >> bit & 1]))
