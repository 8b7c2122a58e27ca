"""Why a turn of a conversation shares less with the turn before than it could.

The prefix cache finds the tokens that two prompts begin with. A turn should begin with the whole of the one before,
its answer included; where it does not, what differs is told by the place: the first other token, the message in which
it stands, and whether the client or the template has changed that one.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

MAX_TURNS = 256
MAX_TOKENS = 8 << 20
"""Of the turns kept: 4 bytes each."""

WHOLE = "the whole turn before is shared"
FIRST = "no earlier turn of this conversation is known"
TOOLS = "the tools changed"
SETTINGS = "the template's settings changed"
FEWER = "earlier messages are no longer there"
CHANGED = "the message changed"
ANSWER = "the answer of the turn before came back changed, or the template shows it in another way"
RENDERED = "the template shows the earlier messages in another way"


class Fingerprint(msgspec.Struct, frozen=True):
    """A conversation by the hashes of its parts, which only this process can compare."""

    tools: int
    settings: int
    messages: tuple[int, ...]

    @classmethod
    def of(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        settings: Mapping[str, Any],
    ) -> Fingerprint:
        """About 3 µs a message."""
        encode = msgspec.json.Encoder(order="sorted").encode
        return cls(hash(encode(tools)), hash(encode(settings)), tuple([hash(encode(each)) for each in messages]))


class Explanation(msgspec.Struct, frozen=True, omit_defaults=True):
    """`shared` of the `previous` tokens of the turn before, its answer included, begin this prompt too.

    `message` is the index of the message in which the first other token stands, None where it stands in none.
    """

    shared: int
    previous: int
    reason: str
    message: int | None = None


@dataclass(frozen=True, slots=True)
class _Turn:
    salt: str
    session: str
    ids: array[int]
    fingerprint: Fingerprint
    answer: Sequence[int]


class Turns:
    """The last turns of all conversations, bounded by their number and their tokens."""

    def __init__(self, max_turns: int = MAX_TURNS, max_tokens: int = MAX_TOKENS) -> None:
        self._turns: deque[_Turn] = deque()
        self._max_turns = max_turns
        self._max_tokens = max_tokens
        self._tokens = 0

    def note(
        self, salt: str, session: str, ids: array[int], fingerprint: Fingerprint, answer: Sequence[int]
    ) -> None:
        """A turn has begun; its `answer` is a list that is still growing."""
        self._turns.append(_Turn(salt, session, ids, fingerprint, answer))
        self._tokens += len(ids)
        while len(self._turns) > self._max_turns or self._tokens > self._max_tokens:
            self._tokens -= len(self._turns.popleft().ids)

    def explain(
        self,
        salt: str,
        session: str,
        ids: Sequence[int],
        fingerprint: Fingerprint,
        message_after: Callable[[int], int | None],
    ) -> Explanation:
        """What these ids share with the turn before: the last one of this session, or the one most alike.

        `message_after` finds the message in which the token behind so many tokens stands.
        """
        new = np.asarray(ids, dtype=np.int32)
        best: tuple[bool, int, int, _Turn] | None = None
        for turn in reversed(list(self._turns)):  # others are noted meanwhile: this may be another thread
            if turn.salt != salt or (session and turn.session != session):
                continue
            old = np.concatenate([np.frombuffer(turn.ids, dtype=np.int32), np.asarray(turn.answer, dtype=np.int32)])
            found = (bool(session) or _alike(turn.fingerprint, fingerprint), _common(old, new), len(old), turn)
            if best is None or found[:2] > best[:2]:
                best = found
            if session:
                break
        if best is None:
            return Explanation(0, 0, FIRST)
        same, shared, previous, turn = best
        if not same:
            return Explanation(shared, previous, FIRST)
        reason, message = _reason(turn, fingerprint, shared, previous)
        if reason == RENDERED:
            message = message_after(shared)
            if message is None or message >= len(turn.fingerprint.messages):
                reason = ANSWER  # what the template writes before it belongs to it
        return Explanation(shared, previous, reason, message)


def message_after(messages: Sequence[Mapping[str, Any]], text: str) -> int | None:
    """The first message that does not stand wholly in a text, as far as its content and its calls say."""
    at = 0
    for index, message in enumerate(messages):
        calls = message.get("tool_calls") or ()
        for part in (message.get("content") or "", *(call["function"]["name"] for call in calls)):
            found = text.find(part.strip(), at)
            if found < 0:
                return index
            at = found + len(part.strip())
    return None


def _alike(old: Fingerprint, new: Fingerprint) -> bool:
    """Turns of one conversation: half of the earlier one's messages are in the later one too."""
    return 2 * len(set(old.messages).intersection(new.messages)) >= len(set(old.messages))


def _common(left: np.ndarray[Any, np.dtype[np.int32]], right: np.ndarray[Any, np.dtype[np.int32]]) -> int:
    size = min(len(left), len(right))
    other = np.flatnonzero(left[:size] != right[:size])
    return int(other[0]) if len(other) else size


def _reason(turn: _Turn, new: Fingerprint, shared: int, previous: int) -> tuple[str, int | None]:
    old = turn.fingerprint
    if shared >= previous - 1:  # the last token may be an end that the template writes in another way
        return WHOLE, None
    if old.tools != new.tools or old.settings != new.settings:
        return (TOOLS if old.tools != new.tools else SETTINGS), None
    both = zip(old.messages, new.messages, strict=False)
    changed = next((index for index, (before, now) in enumerate(both) if before != now), None)
    if changed is not None:
        return CHANGED, changed
    if len(new.messages) < len(old.messages):
        return FEWER, len(new.messages)
    if shared >= len(turn.ids):
        return ANSWER, len(old.messages)
    return RENDERED, None
