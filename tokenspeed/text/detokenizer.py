"""Token ids to text as they come, whole characters only."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from tokenspeed.text.tokenizer import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns the tokens of one choice into text, without ever emitting half a character.

    The deltas of `feed`, and of `flush` at the end, join to `tokenizer.decode` of all the ids, however the
    ids are cut. Bytes that cannot become a character are U+FFFD as soon as that is certain.
    `continues`: the tokens continue a text rather than begin one, so a leading space is theirs.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continues: bool = False) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._strips = tokenizer.strips_leading_space and not continues
        self._decoder = _UTF8("replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that these tokens complete; empty while a character is incomplete."""
        data = b"".join([self._token_bytes(token_id) for token_id in ids if token_id not in self._hidden])
        return self._begun(self._decoder.decode(data))

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character stayed incomplete. The detokenizer is then new again."""
        text = self._begun(self._decoder.decode(b"", True))
        self._decoder.reset()
        return text

    def _begun(self, text: str) -> str:
        if self._strips and text:
            self._strips = False
            return text.removeprefix(" ")
        return text
