"""xgrammar's compiled part: grammars to automata, automata to masks over the vocabulary.

Only its extension is loaded, through tvm_ffi. The Python package around it imports torch and transformers, of which
nothing is needed here: 0.4 s and 43 MiB a process instead of 4 s and 400 MiB. Importing this file costs that much, so
it is imported only where grammars are compiled or followed, never by the front end's own process.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import re
import statistics
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np

from tokenspeed.batch import Int32Array, Int64Array
from tokenspeed.text.grammars.vocabulary import Vocabulary

RAW = 0
"""The kind of a vocabulary whose entries are bytes as they are."""

_LENGTHS, _CHARACTERS = ",1,9,1,34,34,92,92,13,13,10,10,", ",1,9,1,34,34,92,92,0,31,0,31,"
"""How rules spell the characters that minLength and maxLength count: xgrammar lets control characters through, which
no JSON has in a string; and how they spell it without those."""

_WHERE = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+?:\d+: (?:Check failed: \(.*?\) is false: )?")


class GrammarError(ValueError):
    """The grammar cannot be compiled; the message says why in xgrammar's words, without places in its sources."""


def _extension() -> Any:
    """The classes of the extension. A package without its own code stands in while they are registered."""
    name = "xgrammar"
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError("structured output needs the package xgrammar")
    bare = types.ModuleType(name)
    bare.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = bare
    try:
        importlib.import_module(f"{name}.load_binding")
        return importlib.import_module(f"{name}.base")._core
    finally:
        del sys.modules[name]


_core = _extension()


class _Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    ))  # fmt: skip
    uordblks: int
    hblkhd: int


def _heap_reader() -> Callable[[], int]:
    """How many bytes the process has allocated, in 5 µs; always 0 where the C library does not tell (glibc does)."""
    try:
        read = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return lambda: 0
    read.restype = _Heap

    def heap_bytes() -> int:
        heap: _Heap = read()
        return heap.uordblks + heap.hblkhd

    return heap_bytes


_heap_bytes = _heap_reader()


class Compiler:
    """Compiles for one vocabulary. What grammars have in common is compiled once, within `cache_bytes`."""

    def __init__(self, vocabulary: Vocabulary, *, cache_bytes: int, threads: int = 1) -> None:
        self._vocabulary = vocabulary
        tokens = vocabulary.tokens()
        info = _core.TokenizerInfo(tokens, RAW, len(tokens), [vocabulary.stop_id], False)
        self._compiler = _core.GrammarCompiler(info, threads, True, cache_bytes, False)

    @staticmethod
    def parse(format: dict[str, Any]) -> str:
        """A format of structural tags as grammar rules, JSON text for `compile`. Raises `GrammarError`."""
        try:
            tag = json.dumps({"type": "structural_tag", "format": format})
            rules = str(_core.Grammar.from_structural_tag(tag).serialize_json())
            # A grammar of the request's own may well mean that class.
            return rules if '"type": "grammar"' in tag else rules.replace(_LENGTHS, _CHARACTERS)
        except RuntimeError as error:
            raise GrammarError(reason(error)) from None

    def compile(self, rules: str) -> Compiled:
        """What `parse` gave, with the masks of its states. Raises `GrammarError`."""
        try:
            grammar = _core.Grammar.deserialize_json(rules)
            return Compiled(self._compiler.compile_grammar_ebnf(grammar), self._vocabulary)
        except RuntimeError as error:
            raise GrammarError(reason(error)) from None


class Compiled:
    """A grammar ready to be followed, by any number of requests."""

    def __init__(self, grammar: Any, vocabulary: Vocabulary) -> None:
        self._grammar = grammar
        self._vocabulary = vocabulary
        self.num_bytes = int(grammar.memory_size_bytes())

    def matcher(self, stop_ids: set[int]) -> Matcher:
        """Follow it from the start. Of `stop_ids` those without a text may come where the grammar may end.

        Raises `GrammarError` where xgrammar fails.
        """
        ending = sorted(stop_ids & self._vocabulary.textless)
        marks = ending or [self._vocabulary.stop_id]
        try:
            matcher = _core.GrammarMatcher(self._grammar, marks, False, -1, None)
            return Matcher(matcher, np.array(marks), self._vocabulary.vocab_size, stops=bool(ending))
        except RuntimeError as error:
            raise GrammarError(reason(error)) from None


class Matcher:
    """How far one text has come in its grammar. `mask` [V / 32] int32 has a bit for each token that may come next.

    `ended`: nothing may come any more.
    """

    def __init__(self, matcher: Any, ending: Int64Array, vocab_size: int, *, stops: bool) -> None:
        self._matcher = matcher
        self._word, self._bit = ending // 32, (1 << (ending % 32)).astype(np.uint32).view(np.int32)
        self._stops = stops
        # A vocabulary whose ids all have a text has one more here, which is no part of what others see.
        self._bits: Int32Array = np.zeros((1, num_words(max(vocab_size, int(ending.max()) + 1))), dtype=np.int32)
        self.mask: Int32Array = self._bits[0, : num_words(vocab_size)]
        self.ended = False
        self._look()

    def accept(self, token: int) -> bool:
        """Go on with a token; False if the grammar does not allow it. Raises `GrammarError` where xgrammar fails."""
        try:
            if not self._matcher.accept_token(token, False):
                return False
            self._look()
        except RuntimeError as error:
            raise GrammarError(reason(error)) from None
        return True

    @property
    def completed(self) -> bool:
        """The text so far matches the whole grammar; it may go on all the same."""
        return bool(self._matcher.is_completed())

    def num_bytes(self) -> int:
        """About what the text so far takes: it grows with every token, and xgrammar does not say how much it is.

        Measured by what a copy takes. Other threads allocate meanwhile, so it is the middle of three measurements.
        """
        return int(statistics.median(self._copy_bytes() for _ in range(3)))

    def _copy_bytes(self) -> int:
        before = _heap_bytes()
        copy = self._matcher.fork()
        grown = _heap_bytes() - before
        del copy
        return grown

    def _look(self) -> None:
        bits = self._bits[0]
        self._matcher.fill_next_token_bitmask(self._bits, 0, False)
        if self._matcher.is_completed():
            ending = bits[self._word]
            np.bitwise_and.at(bits, self._word, ~self._bit)
            self.ended = not bits.any()
            if self._stops:
                bits[self._word] = ending


def num_words(vocab_size: int) -> int:
    """Words of 32 bits that hold a bit a token."""
    return -(-vocab_size // 32)


def reason(error: RuntimeError) -> str:
    """What xgrammar says, in one line and without places in its sources."""
    return " ".join(_WHERE.sub("", str(error)).split())[:300]
