"""tiktoken rank files (`*.tiktoken`, tiktoken.model of Kimi, tokenizer.model of Llama 3): one "base64 rank" a line.

Such a file says nothing about how text is cut into words, nor which tokens are special: both come from
tokenizer_config.json, the cut by its `pat_str`, or by the tokenizer class where its expression is known.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tiktoken

from tokenspeed.errors import CheckpointError
from tokenspeed.text.files import read_bytes, token_text
from tokenspeed.text.tokenizer import ControlFinder, Match, Tokenizer, pieces_between

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = GPT4.replace(r"\p{N}{1,3}", r"\p{N}")


def _kimi() -> str:
    """Kimi's cut: Han characters by themselves, other words where small letters end, with their contraction."""
    other = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
    large, small = rf"[\p{{Lu}}\p{{Lt}}{other}]", rf"[\p{{Ll}}{other}]"
    before, after = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    words = (f"{before}{large}*{small}+{after}", f"{before}{large}+{small}*{after}")
    return "|".join((r"\p{Han}+", *words, r"\p{N}{1,3}", GPT4[GPT4.index(r" ?[^\s") :]))


PATTERNS: dict[str, str] = {
    "PreTrainedTokenizerFast": GPT4,
    "LlamaTokenizer": GPT4,
    "QWenTokenizer": QWEN,
    "TikTokenTokenizer": _kimi(),
}
"""Splitting expressions by `tokenizer_class`. A family with its own expression adds a line here."""

MAX_CHARACTERS, MAX_RUN = 400_000, 25_000
"""Text is cut after so many characters, and after so many blanks, or others, in a row. Both numbers are those
that Llama 3 and Kimi K2 publish with their tokenizers. Without them a run of a million blanks overflows the
stack of tiktoken's expression engine, and the process panics.
"""
RUN = re.compile(r"\s+|\S+")


def looks_like_ranks(head: bytes) -> bool:
    """True if the first bytes of a file are a line of base64, a blank and a number."""
    parts = head.split(b"\n", 1)[0].split()
    return len(parts) == 2 and parts[1].isdigit()


class TiktokenTokenizer(Tokenizer):
    """A tokenizer from ranks (bytes to id), a splitting expression and control tokens (spelling to id)."""

    def __init__(
        self,
        ranks: Mapping[bytes, int],
        pattern: str,
        control: Mapping[str, int],
        config: Mapping[str, Any],
        name: str,
    ) -> None:
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise CheckpointError(f"{name}: has no rank for byte 0x{missing[0]:02x}")
        taken = set(ranks.values())
        for content, token_id in control.items():
            if token_id in taken:
                raise CheckpointError(f"{name}: token {content!r} has id {token_id}, which is an ordinary token's")
        try:
            self._encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(control)
            )
        except (ValueError, AssertionError) as error:
            raise CheckpointError(f"{name}: {error}") from error
        self.control = control
        self.cut_ids = frozenset(control.values())
        decoder = config.get("added_tokens_decoder") or {}
        shown = {int(token_id) for token_id, entry in decoder.items() if not entry.get("special", False)}
        self.special_ids = frozenset(control.values()) - shown
        self.vocab_size = 1 + max([*ranks.values(), *control.values()])
        self._finder = ControlFinder(control)
        self._bytes: list[bytes] = [b""] * self.vocab_size
        for data, token_id in ranks.items():
            self._bytes[token_id] = data
        for content, token_id in control.items():
            self._bytes[token_id] = content.encode("utf-8")
        self.bos_token_id = control.get(token_text(config.get("bos_token")) or "")
        self.eos_token_id = control.get(token_text(config.get("eos_token")) or "")
        if config.get("add_bos_token") is True and self.bos_token_id is not None:
            self.prefix_ids = (self.bos_token_id,)
        if config.get("add_eos_token") is True and self.eos_token_id is not None:
            self.suffix_ids = (self.eos_token_id,)

    @classmethod
    def from_file(cls, path: Path, config: Mapping[str, Any]) -> TiktokenTokenizer:
        """Read a rank file. Raises `CheckpointError` naming the file, or the tokenizer class if unknown."""
        pattern = config.get("pat_str")
        if not isinstance(pattern, str):
            kind = str(config.get("tokenizer_class"))
            if kind not in PATTERNS:
                raise CheckpointError(f"{path}: how tokenizer_class {kind} splits text is not known; add a pat_str")
            pattern = PATTERNS[kind]
        return cls(_ranks(path), pattern, _control(config, path), config, str(path))

    def _encode(self, text: str, matches: list[Match]) -> list[int]:
        ids: list[int] = []
        for piece in pieces_between(text, matches):
            if isinstance(piece, int):
                ids.append(piece)
            else:
                for part in short_runs(piece):
                    ids += self._encoding.encode_ordinary(part)
        return ids

    def _token_bytes(self, token_id: int) -> bytes:
        return self._bytes[token_id]


def short_runs(text: str) -> Iterator[str]:
    """The text in parts of at most `MAX_CHARACTERS`, with runs of at most `MAX_RUN`."""
    if len(text) <= MAX_RUN:
        yield text
        return
    for start in range(0, len(text), MAX_CHARACTERS):
        end = min(start + MAX_CHARACTERS, len(text))
        at = start
        for run in RUN.finditer(text, start, end):
            for cut in range(run.start() + MAX_RUN, run.end(), MAX_RUN):
                yield text[at:cut]
                at = cut
        yield text[at:end]


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            data, rank = line.split()
            ranks[base64.b64decode(data, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(f"{path}: line {number} is not a token and its rank") from error
    if not ranks or min(ranks.values()) < 0 or max(ranks.values()) >= 1 << 24 or len(set(ranks.values())) != len(ranks):
        raise CheckpointError(f"{path}: the ranks are not distinct numbers from 0")
    return ranks


def _control(config: Mapping[str, Any], path: Path) -> dict[str, int]:
    try:
        decoder = config.get("added_tokens_decoder") or {}
        return {entry["content"]: int(token_id) for token_id, entry in decoder.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path.parent / 'tokenizer_config.json'}: added_tokens_decoder is malformed") from error
