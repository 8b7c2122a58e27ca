"""The tokens as a grammar sees them: bytes that may stand in a text, and ids that have none."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import msgspec
import numpy as np

from tokenspeed.text.parsers.choose import REASONING_PARSERS, TOOL_PARSERS
from tokenspeed.text.tokenizer import Tokenizer


class Vocabulary(msgspec.Struct, frozen=True, dict=True):
    """Bytes of every token, joined, and their number for each (little-endian int32).

    `vocab_size` is the model's. `stop_id`, an id without a text, marks ends; where every id has one it is one more.
    """

    vocab_size: int
    stop_id: int
    joined: bytes
    sizes: bytes

    @classmethod
    def of(cls, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Iterable[int]) -> Vocabulary:
        """Special tokens are no text, but for those with which formats mark their parts."""
        shown = marker_ids(tokenizer)
        hidden = (tokenizer.special_ids - shown) | set(eos_token_ids)
        tokens = [b"" if token_id in hidden else tokenizer.token_bytes(token_id) for token_id in range(vocab_size)]
        textless = [token_id for token_id, text in enumerate(tokens) if not text]
        stop = min(eos_token_ids, default=None)
        if stop is None:
            stop = textless[0] if textless else vocab_size
        if stop == vocab_size:  # every id has a text: one more, which is never sampled, marks the end
            tokens.append(b"")
        sizes = np.fromiter(map(len, tokens), dtype="<i4", count=len(tokens))
        return cls(vocab_size, stop, b"".join(tokens), sizes.tobytes())

    def tokens(self) -> list[bytes]:
        """The bytes of each token by id."""
        ends = np.frombuffer(self.sizes, dtype="<i4").cumsum().tolist()
        return [self.joined[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    @cached_property
    def textless(self) -> frozenset[int]:
        """Ids without a text."""
        return frozenset(np.flatnonzero(np.frombuffer(self.sizes, dtype="<i4") == 0).tolist())


def marker_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The special tokens that formats of reasoning and tool calls are written with."""
    texts = {text for thinking in REASONING_PARSERS.values() for text in thinking.marks}
    texts.update(text for parser in TOOL_PARSERS.values() for text in parser.markers)
    return tokenizer.special_ids & {tokenizer.control[text] for text in texts if text in tokenizer.control}
