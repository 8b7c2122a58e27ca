"""Sessions of coding agents: the file format, the rules of a replay, and the token ids of a conversation.

A file is JSON, gzipped where its name ends in `.gz`: a list of `{"id": str, "tool_sys": int, "turns": [...]}`.
`tool_sys` is the tokens of tools and system prompt. A turn is `[kept, new, output, think]`: prompt tokens that
the turn shares with the request before it, prompt tokens that are new, tokens generated, seconds of pause
before the request is sent. `kept` falls when the client compacts or rewrites its history.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tokenspeed.batch import Int32Array
from tokenspeed.errors import ConfigError

MAX_PROMPT = 131_072
"""Tokens; longer requests are dropped from a replay."""

MAX_PAUSE = 60.0
"""Seconds; longer pauses are cut to this."""


class TraceError(ConfigError):
    """A file of sessions is missing, unreadable or not in the format. The message is one line and names the file."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request: `kept + new` prompt tokens, `output` generated ones, sent `think` seconds after the turn before."""

    kept: int
    new: int
    output: int
    think: float

    @property
    def prompt(self) -> int:
        """Prompt tokens."""
        return self.kept + self.new


@dataclass(frozen=True, slots=True)
class Session:
    """The turns of one agent; its tools and system prompt have `tool_sys` tokens."""

    id: str
    tool_sys: int
    turns: tuple[Turn, ...]


def read_sessions(path: Path) -> list[Session]:
    """The sessions of a file. Raises `TraceError`."""
    try:
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        items = json.loads(text)
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror or error}") from None
    except (EOFError, zlib.error) as error:
        raise TraceError(f"{path} is no complete gzip file: {error}") from None
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path} is not JSON: {error}") from None
    if not isinstance(items, list) or not items:
        raise TraceError(f"{path}: expected a list of sessions with at least one")
    return [_session(item, f"{path}: session {index}") for index, item in enumerate(items)]


def _session(item: object, where: str) -> Session:
    match item:
        case {"id": str(name), "tool_sys": int(tool_sys), "turns": list(turns)} if tool_sys >= 0 and turns:
            return Session(name, tool_sys, tuple(_turn(turn, f"{where}, turn {i}") for i, turn in enumerate(turns)))
        case _:
            raise TraceError(f'{where}: expected {{"id": text, "tool_sys": tokens, "turns": [at least one]}}')


def _turn(item: object, where: str) -> Turn:
    match item:
        case [int(kept), int(new), int(output), int(think) | float(think)] if (
            kept >= 0 and new > 0 and output >= 0 and 0 <= think < math.inf and bool not in map(type, item)
        ):
            return Turn(kept, new, output, float(think))
        case _:
            raise TraceError(f"{where}: expected [kept, new, output, think] with no negative number and new above 0")


def write_sessions(path: Path, sessions: list[Session]) -> None:
    """Write the format that `read_sessions` reads; equal sessions give equal bytes. Raises `TraceError`."""
    items = [
        {"id": s.id, "tool_sys": s.tool_sys, "turns": [[t.kept, t.new, t.output, t.think] for t in s.turns]}
        for s in sessions
    ]
    data = json.dumps(items, separators=(",", ":")).encode()
    try:
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    except OSError as error:
        raise TraceError(f"cannot write {path}: {error.strerror or error}") from None


def apply_rules(
    sessions: list[Session], *, max_prompt: int = MAX_PROMPT, max_pause: float = MAX_PAUSE
) -> list[Session]:
    """Sessions without requests over `max_prompt` tokens, and with no pause over `max_pause` seconds.

    What a turn keeps is counted from the request that was really sent before it: over dropped ones it is the
    least that any of them kept. A request asks for one token at least. Sessions without a turn left are left out.
    """
    replayed = []
    for session in sessions:
        turns = []
        kept = math.inf
        for turn in session.turns:
            kept = min(kept, turn.kept)
            if turn.prompt > max_prompt:
                continue
            shared = int(kept)
            turns.append(Turn(shared, turn.prompt - shared, max(1, turn.output), min(turn.think, max_pause)))
            kept = math.inf
        if turns:
            replayed.append(Session(session.id, session.tool_sys, tuple(turns)))
    return replayed


class FreshIds:
    """Token ids that no prompt had before: one counter over all of int32's positive half, from `SHARED` up."""

    SHARED = 1 << 20
    """Ids below are the shared system prompt's."""

    def __init__(self) -> None:
        self._next = self.SHARED

    def take(self, count: int) -> Int32Array:
        """`count` ids. Past 2^31 the counter begins again: by then, the first ids are long evicted."""
        if self._next + count > np.iinfo(np.int32).max:
            self._next = self.SHARED
        first = self._next
        self._next += count
        return np.arange(first, first + count, dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What a session sends next. `reusable`: prompt tokens whose KV could still be there, with memory without end."""

    prompt: Int32Array
    output: int
    think: float
    reusable: int


class Conversation:
    """One session under way, from turn `start` on: its requests with their token ids, one after the other.

    The simulated device samples, as the token at position p of a sequence, the id p; so a prompt that keeps a
    part of what was generated is known without asking for it. The first request is cold, whatever its turn kept
    of the ones before `start`; with `shared_system` it begins with `tool_sys` ids that all sessions have in common.
    """

    def __init__(self, session: Session, start: int, fresh: FreshIds, *, serial: int, shared_system: bool) -> None:
        self.serial = serial
        self._fresh = fresh
        self._shared = min(session.tool_sys, FreshIds.SHARED) if shared_system else 0
        self._turns = iter(session.turns[start:])
        self._prompt = np.empty(0, dtype=np.int32)
        self._known = 0

    def next_request(self) -> Request | None:
        """The next turn, or None when the session has ended."""
        turn = next(self._turns, None)
        if turn is None:
            return None
        tokens = np.empty(turn.prompt, dtype=np.int32)
        if self._known:
            kept = min(turn.kept, self._known)
            old = min(kept, len(self._prompt))
            tokens[:old] = self._prompt[:old]
            tokens[old:kept] = np.arange(old, kept, dtype=np.int32)
            held = min(kept, self._known - 1)  # the last token that was generated has no KV
        else:
            kept = held = min(self._shared, turn.prompt)
            tokens[:kept] = np.arange(kept, dtype=np.int32)
        tokens[kept:] = self._fresh.take(turn.prompt - kept)
        self._prompt = tokens
        self._known = turn.prompt + turn.output
        # The last token of a prompt is always computed: its output is the first generated token.
        return Request(tokens, turn.output, turn.think, min(held, turn.prompt - 1))
