"""The tokenizer as the rest of the engine sees it; one backend a file beside this one.

Text and control are kept apart here. Ordinary text never becomes a control token, whatever it spells:
control tokens appear only where a caller asks for them (`parse_special`, the template's spans, the tokens
that the checkpoint puts around a prompt).
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from tokenspeed.errors import InvalidRequest
from tokenspeed.text.spans import Span, template_runs

CHECKED_CHARACTERS = 1 << 16


@dataclass(frozen=True, slots=True)
class Match:
    """A control token found in a text: characters start to end are its spelling."""

    start: int
    end: int
    token_id: int


class Segment(NamedTuple):
    """A part of a prompt whose token ids do not depend on the rest of it.

    It begins with the spelling `control` of a control token, "" only where a prompt begins with other text. `inner`
    are the control tokens behind that one before which no cut is possible.
    """

    text: str
    control: str
    inner: tuple[Match, ...] = ()


class ControlFinder:
    """Finds the spellings of control tokens in a text: leftmost first, longest of those.

    `spellings` maps text to token id; one in `whole_words` matches only between characters that are no
    part of a word. The cost is O(characters), plus a few dictionary look-ups where a first character fits.
    """

    def __init__(self, spellings: Mapping[str, int], whole_words: Collection[str] = ()) -> None:
        self._ids = {text: token_id for text, token_id in spellings.items() if text}
        self._whole_words = frozenset(whole_words)
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: tuple(sorted(sizes, reverse=True)) for first, sizes in lengths.items()}
        self._first = re.compile("[" + re.escape("".join(self._lengths)) + "]") if self._lengths else None

    def find(self, text: str, start: int, end: int) -> Iterator[Match]:
        """The matches that lie wholly between start and end, in order, not overlapping."""
        if self._first is None:
            return
        at = start
        while (candidate := self._first.search(text, at, end)) is not None:
            at = candidate.start()
            match = self._at(text, at, end)
            if match is None:
                at += 1
            else:
                yield match
                at = match.end

    def _at(self, text: str, start: int, end: int) -> Match | None:
        for length in self._lengths[text[start]]:
            spelling = text[start : start + length]
            if start + length > end or (token_id := self._ids.get(spelling)) is None:
                continue
            if spelling in self._whole_words and _inside_word(text, start, start + length):
                continue
            return Match(start, start + length, token_id)
        return None


WORD_CATEGORIES = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"))
# What is alphabetic though its category says symbol, and the two joiners.
WORD_SYMBOLS = re.compile("[Ⓐ-ⓩ\U0001f130-\U0001f149\U0001f150-\U0001f169\U0001f170-\U0001f189\u200c\u200d]")


def _inside_word(text: str, start: int, end: int) -> bool:
    return _of_word(text[start - 1 : start]) or _of_word(text[end : end + 1])


def _of_word(character: str) -> bool:
    r"""Whether a character, if there is one, is part of a word as annex C of Unicode's UTS #18 has it. Python's own \w
    takes other numbers for it (¹) and leaves combining marks out."""
    if not character:
        return False
    return unicodedata.category(character) in WORD_CATEGORIES or WORD_SYMBOLS.match(character) is not None


class TokenTable(dict[int, bytes]):
    """The bytes of each token, computed when first asked for: a look-up costs the detokenizer 0.05 µs."""

    def __init__(self, vocab_size: int, bytes_of: Callable[[int], bytes]) -> None:
        super().__init__()
        self._vocab_size = vocab_size
        self._bytes_of = bytes_of

    def __missing__(self, token_id: int) -> bytes:
        if token_id < 0:
            raise InvalidRequest(f"token id {token_id} is negative")
        if token_id >= self._vocab_size:
            return b""
        self[token_id] = data = self._bytes_of(token_id)
        return data


class TextTable(dict[int, str | None]):
    """The text of each token that is one by itself, None for parts of characters; computed when first asked for."""

    def __init__(self, table: TokenTable) -> None:
        super().__init__()
        self._table = table

    def __missing__(self, token_id: int) -> str | None:
        text: str | None = None
        with contextlib.suppress(UnicodeDecodeError):
            text = self._table[token_id].decode()
        self[token_id] = text
        return text


class Tokenizer(ABC):
    """Text to token ids and back. Safe to use from several threads at once.

    `vocab_size` is one more than the largest id, added tokens included. `special_ids` are the ids that
    `skip_special_tokens` leaves out; `control` maps the spelling of every token that is recognised only
    in template text to its id: the special ones, and those like `</think>` that are shown but not typed.
    `strips_leading_space`: one space at the very start of decoded text was put there by encoding
    (sentencepiece's rule). `prefix_ids` and `suffix_ids` are what the checkpoint puts around a prompt.
    `cut_ids` are the control tokens that no ordinary text becomes and that take nothing from the text before them:
    what stands before one and what begins with it are encoded apart with the same result.
    """

    vocab_size: int
    bos_token_id: int | None
    eos_token_id: int | None
    special_ids: frozenset[int]
    control: Mapping[str, int]
    cut_ids: frozenset[int]
    strips_leading_space: bool = False
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    _finder: ControlFinder

    @cached_property
    def table(self) -> TokenTable:
        """The raw bytes of every token by id; empty for an id that stands for nothing.

        Models often have more ids than their tokenizer has tokens, and may sample those: they are empty
        too. Raises `InvalidRequest` for a negative id.
        """
        return TokenTable(self.vocab_size, self._token_bytes)

    @cached_property
    def texts(self) -> TextTable:
        """The text of every token that is whole characters, by id."""
        return TextTable(self.table)

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        """Token ids of a text. `parse_special` recognises control tokens in it: never for a request's text.

        Raises `InvalidRequest` for text that is no valid Unicode (a lone surrogate).
        """
        matches = self._finder.find(text, 0, len(text)) if parse_special else ()
        ids = self._encode(_checked(text), list(matches))
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids

    def encode_spans(self, spans: Sequence[Span]) -> list[int]:
        """Token ids of a rendered prompt, control tokens recognised only inside the template's text.

        Ordinary text is encoded across the borders of spans: as long as no request text spells a control
        token, the ids equal those of the whole string with `parse_special`. No prefix or suffix is added.
        """
        return self._encode(*self._matched(spans))

    def segments(self, spans: Sequence[Span]) -> list[Segment]:
        """A rendered prompt in the parts that can be encoded one by one: see `encode_segments`."""
        text, matches = self._matched(spans)
        segments: list[Segment] = []
        start, control = 0, ""
        inner: list[Match] = []
        for match in matches:
            if match.token_id not in self.cut_ids:
                inner.append(Match(match.start - start, match.end - start, match.token_id))
                continue
            if match.start:
                segments.append(Segment(text[start : match.start], control, tuple(inner)))
                inner.clear()
            start, control = match.start, text[match.start : match.end]
        if start < len(text):
            segments.append(Segment(text[start:], control, tuple(inner)))
        return segments

    def encode_segments(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Token ids of each segment: those of a prompt's segments join to what `encode_spans` gives for it."""
        return self._encode_each([(segment.text, self._matches_in(segment)) for segment in segments])

    def _matched(self, spans: Sequence[Span]) -> tuple[str, list[Match]]:
        text = _checked("".join([span.text for span in spans]))
        return text, [match for start, end in template_runs(spans) for match in self._finder.find(text, start, end)]

    def _matches_in(self, segment: Segment) -> list[Match]:
        first = [Match(0, len(segment.control), self.control[segment.control])] if segment.control else []
        return [*first, *segment.inner]

    def _encode_each(self, parts: list[tuple[str, list[Match]]]) -> list[list[int]]:
        return [self._encode(text, matches) for text, matches in parts]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids. Bytes that are no UTF-8 become U+FFFD, one for each maximal invalid part."""
        hidden = self.special_ids if skip_special_tokens else frozenset()
        table = self.table
        data = b"".join([table[token_id] for token_id in ids if token_id not in hidden])
        text = data.decode("utf-8", "replace")
        return text[1:] if self.strips_leading_space and text.startswith(" ") else text

    def token_bytes(self, token_id: int) -> bytes:
        """The raw bytes of one token, as in `table`."""
        return self.table[token_id]

    @abstractmethod
    def _encode(self, text: str, matches: list[Match]) -> list[int]:
        """Encode `text`; the matched stretches are control tokens, all else is ordinary text."""

    @abstractmethod
    def _token_bytes(self, token_id: int) -> bytes: ...


def pieces_between(text: str, matches: list[Match]) -> Iterator[str | int]:
    """The ordinary stretches of a text and, between them, the ids of the matches; no empty stretch."""
    at = 0
    for match in matches:
        if at < match.start:
            yield text[at : match.start]
        yield match.token_id
        at = match.end
    if at < len(text):
        yield text[at:]


def _checked(text: str) -> str:
    start = 0
    try:
        # By parts: a text of a million characters at once holds the interpreter 1.5 ms.
        for start in range(0, 0 if text.isascii() else len(text), CHECKED_CHARACTERS):
            text[start : start + CHECKED_CHARACTERS].encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text has a lone surrogate at character {start + error.start}") from error
    return text
