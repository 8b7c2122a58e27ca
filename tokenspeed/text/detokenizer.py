"""Token ids to text as they come, whole characters only."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Collection, Sequence

from tokenspeed.text.tokenizer import Tokenizer


class Detokenizer:
    """Turns the tokens of one choice into text, without ever emitting half a character.

    The deltas of `feed`, and of `flush` at the end, join to `tokenizer.decode` of all the ids, however the
    ids are cut. Bytes that cannot become a character are U+FFFD as soon as that is certain.
    `shown_ids` are special tokens that `skip_special_tokens` does not hide. `continues`: the tokens
    continue a text rather than begin one, so a leading space is theirs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        shown_ids: Collection[int] = (),
        continues: bool = False,
    ) -> None:
        self._table = tokenizer.table
        self._texts = tokenizer.texts
        self._hidden = tokenizer.special_ids.difference(shown_ids) if skip_special_tokens else frozenset()
        self._strips = tokenizer.strips_leading_space and not continues
        self._rest = b""

    def feed(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty while a character is incomplete."""
        table, hidden = self._table, self._hidden
        if len(ids) == 1 and not self._rest and not self._strips and ids[0] not in hidden:
            text = self._texts[ids[0]]
            if text is not None:
                return text
        data = b"".join([self._rest, *[table[token_id] for token_id in ids if token_id not in hidden]])
        text, used = utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return self._begun(text) if self._strips else text

    @property
    def rest(self) -> bytes | None:
        """The bytes of the character that is incomplete; None while the next token's text may lose a leading space."""
        return None if self._strips else self._rest

    def flush(self) -> str:
        """What is left at the end: U+FFFD if a character stayed incomplete."""
        text, _ = utf_8_decode(self._rest, "replace", True)
        self._rest = b""
        return self._begun(text) if self._strips else text

    def _begun(self, text: str) -> str:
        if text:
            self._strips = False
        return text.removeprefix(" ")
