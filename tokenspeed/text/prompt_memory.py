"""Token ids of prompts, with what was encoded and generated before taken from memory.

A turn of a conversation repeats the turns before it. A prompt is cut at its control tokens, where a cut leaves no
trace in the ids (`Tokenizer.segments`), and only segments that were not seen before are encoded.

Generated text comes back as a part of the next prompt, and encoded anew it may become other tokens than the model
chose: the prefix cache would miss from there on. So the ids of an answer are kept under the ids that led to it, and
taken where the same text follows the same ids. Where only the begin of the text is the same (a template strips a
blank, a client cuts the end), the ids of that begin are taken and the rest is encoded. The ids always decode to the
text of the prompt.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol, Self

import msgspec

from tokenspeed.text.recent import Recent
from tokenspeed.text.spans import Span
from tokenspeed.text.tokenizer import Segment, Tokenizer

MAX_SEGMENT_BYTES, MAX_ANSWER_BYTES = 192 << 20, 64 << 20
"""A conversation of 50,000 tokens takes 0.5 MB of the first."""
ENTRY_BYTES = 400
"""What an entry takes beside its text and its ids."""
MAX_ANSWERS = 16
"""Answers kept for one prompt: the last ones."""
MIN_TAKEN = 16
"""Tokens from which the begin of an answer is worth taking whose end came back changed."""
MAX_PARTIAL = 4
"""Tokens at the end of an answer that may be a part of a character."""


class MemoryStats(msgspec.Struct, frozen=True, kw_only=True):
    """`bytes` as they are now; prompt tokens since the start by where they came from."""

    bytes: int = 0
    tokens_encoded: int = 0
    tokens_known: int = 0
    tokens_generated: int = 0


class _Hash(Protocol):
    def update(self, data: array[int], /) -> None: ...
    def digest(self) -> bytes: ...
    def copy(self) -> Self: ...


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """The ids of a prompt, and what `PromptMemory.remember` needs to know of it.

    `last` is the segment at the end, which the answer continues. It begins at `last_start` of the ids; `before` is
    the running hash of those in front of it.
    """

    ids: array[int]
    last: Segment
    last_start: int
    before: _Hash


@dataclass(frozen=True, slots=True)
class _Answer:
    """A generated segment. Its first `given` characters, which are `given_ids` ids, stood there before."""

    segment: Segment
    ids: array[int]
    given: int
    given_ids: int


class PromptMemory:
    """Encodes prompts as `Tokenizer.encode_spans` does, except for text that was generated here.

    Bounded by bytes: the least recently used goes first. What is kept under one `salt` is never used under another.
    Safe to use from several threads at once.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_segment_bytes: int = MAX_SEGMENT_BYTES,
        max_answer_bytes: int = MAX_ANSWER_BYTES,
    ) -> None:
        self._tokenizer = tokenizer
        self._control_ids = frozenset(tokenizer.control.values())
        self._segments: Recent[tuple[bytes, Segment], array[int]] = Recent(
            max_segment_bytes, lambda key, ids: _size(key[1], ids)
        )
        self._answers: Recent[bytes, tuple[_Answer, ...]] = Recent(
            max_answer_bytes, lambda _, answers: sum(_size(answer.segment, answer.ids) for answer in answers)
        )
        self._lock = threading.Lock()
        self._encoded = self._known = self._generated = 0

    def stats(self) -> MemoryStats:
        """What is kept, and what it was good for."""
        return MemoryStats(
            bytes=self._segments.bytes + self._answers.bytes,
            tokens_encoded=self._encoded,
            tokens_known=self._known,
            tokens_generated=self._generated,
        )

    def encode(self, spans: Sequence[Span], salt: bytes = b"") -> EncodedPrompt:
        """The ids of a rendered prompt. Raises `InvalidRequest` as the tokenizer does."""
        segments = self._tokenizer.segments(spans)
        ids = array("i")
        chain: _Hash = blake2b(key=blake2b(salt).digest(), digest_size=16)
        before, start = chain, 0
        encoded = generated = 0
        fresh: dict[Segment, array[int]] = {}
        for number, segment in enumerate(segments):
            if number + 1 == len(segments):
                before, start = chain.copy(), len(ids)
            found = self._generated_ids(chain.digest(), segment)
            if found is not None:
                generated += len(found)
            elif segment in fresh or (found := self._segments.get((salt, segment))) is None:
                if segment not in fresh:
                    fresh = self._encode(segments[number:], salt)
                found = fresh[segment]
                encoded += len(found)
            ids.extend(found)
            chain.update(found)
        with self._lock:
            self._encoded += encoded
            self._generated += generated
            self._known += len(ids) - encoded - generated
        return EncodedPrompt(ids, segments[-1] if segments else Segment("", ""), start, before)

    def remember(self, prompt: EncodedPrompt, output_ids: Sequence[int]) -> None:
        """Keep the tokens that followed a prompt, end-of-sequence included."""
        chain = prompt.before.copy()
        text, control, inner = prompt.last
        ids = prompt.ids[prompt.last_start :]
        for first, piece in self._pieces(output_ids):
            if first is not None:
                text = control = self._tokenizer.table[first].decode()
                inner, ids = (), array("i", [first])
            added, whole = self._text(piece)
            if added:
                segment = Segment(text + added, control, inner)
                self._keep(chain.digest(), _Answer(segment, ids + whole, len(text), len(ids)))
            if len(whole) < len(piece):
                return
            chain.update(ids + whole)

    def _pieces(self, ids: Sequence[int]) -> Iterator[tuple[int | None, array[int]]]:
        """Generated ids as segments: a control token and what follows it; the first goes on with the prompt's last."""
        first, piece = None, array("i")
        for token_id in ids:
            if token_id not in self._control_ids:
                piece.append(token_id)
                continue
            yield first, piece
            if token_id not in self._tokenizer.cut_ids:
                return
            first, piece = token_id, array("i")
        yield first, piece

    def _text(self, ids: array[int]) -> tuple[str, array[int]]:
        """The text of ordinary tokens, and those that it consists of: a character cut off at the end is none."""
        table = self._tokenizer.table
        for end in range(len(ids), max(-1, len(ids) - MAX_PARTIAL), -1):
            with contextlib.suppress(UnicodeDecodeError):
                return b"".join([table[token_id] for token_id in ids[:end]]).decode(), ids[:end]
        return "", array("i")

    def _keep(self, before: bytes, answer: _Answer) -> None:
        others = [other for other in self._answers.get(before) or () if other.segment != answer.segment]
        self._answers.put(before, (answer, *others[: MAX_ANSWERS - 1]))

    def _generated_ids(self, before: bytes, segment: Segment) -> array[int] | None:
        """The ids of a segment of which all, or the begin, was generated after the ids of this hash."""
        answers = self._answers.get(before)
        if answers is None:
            return None
        for answer in answers:
            if answer.segment == segment:
                return answer.ids
        alike = [answer for answer in answers if answer.segment[1:] == segment[1:]]
        if not alike:
            return None
        common, answer = max(
            [(common_prefix(answer.segment.text, segment.text), answer) for answer in alike], key=lambda pair: pair[0]
        )
        ids = self._completed(answer, common, segment)
        if ids is not None:
            # The same ids in every turn from now on, whatever else is generated here.
            self._keep(before, _Answer(segment, ids, answer.given, answer.given_ids))
        return ids

    def _completed(self, answer: _Answer, common: int, segment: Segment) -> array[int] | None:
        """The ids of `answer` as far as its first `common` characters go, and the rest of `segment` encoded.

        None where that is too little to be worth it, or would not decode to the text.
        """
        if common <= answer.given:
            return None
        data = answer.segment.text[answer.given : common].encode()
        table = self._tokenizer.table
        at = taken = size = 0
        for count, token_id in enumerate(answer.ids[answer.given_ids :], 1):
            at += len(table[token_id])
            if at > len(data):
                break
            if at == len(data) or data[at] & 0xC0 != 0x80:  # not within a character
                taken, size = count, at
        if taken < MIN_TAKEN and answer.given_ids + taken < len(answer.ids):
            return None
        head = answer.ids[: answer.given_ids + taken]
        rest = segment.text[answer.given + len(data[:size].decode()) :]
        if not rest:
            return head
        # Behind a control token, because the begin of a text may be encoded in another way than its middle.
        made = self._tokenizer.encode_segments([Segment(segment.control + rest, segment.control)])[0]
        tail = made[1:] if segment.control else made
        if b"".join([table[token_id] for token_id in tail]) != rest.encode():
            return None
        return head + array("i", tail)

    def _encode(self, segments: Sequence[Segment], salt: bytes) -> dict[Segment, array[int]]:
        """Encode the first segment and, in the same go, all others that are not known."""
        others = [segment for segment in segments[1:] if (salt, segment) not in self._segments]
        missing = list(dict.fromkeys([segments[0], *others]))
        made = {
            segment: array("i", ids)
            for segment, ids in zip(missing, self._tokenizer.encode_segments(missing), strict=True)
        }
        for segment, ids in made.items():
            self._segments.put((salt, segment), ids)
        return made


def common_prefix(left: str, right: str) -> int:
    """How many characters at the begin of both are the same."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left.startswith(right[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _size(segment: Segment, ids: array[int]) -> int:
    return sys.getsizeof(segment.text) + len(ids) * ids.itemsize + ENTRY_BYTES
