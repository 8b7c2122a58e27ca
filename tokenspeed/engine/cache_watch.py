"""Which KV blocks the engine has cached, for whoever follows that: a mirror of its prefix cache, and its last changes.

Those who follow read one history, each at its own place in it. Who falls behind its beginning is shown the whole state
and goes on from there, so that a slow reader costs no memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence

import msgspec

from tokenspeed.batch import CacheChange, CacheEvents
from tokenspeed.errors import ConfigError, RequestError

CHUNK_EVENTS = 1_000
"""Of one batch at most; a chunk of a snapshot has as many blocks."""

HISTORY_EVENTS = 1 << 15
"""Events that are remembered: some 14 MB if all are new blocks of 64 tokens."""


class Stored(msgspec.Struct, tag="stored", frozen=True, gc=False):
    """A block can be found from now on. `parent` is the block before it in its chain, None if it is the first.

    `token_ids` are those of the block alone, int32.
    """

    hash: int
    parent: int | None
    token_ids: bytes


class Removed(msgspec.Struct, tag="removed", frozen=True, gc=False):
    """A block can be found no more. Those behind it in its chain may still be cached, of no use without it."""

    hash: int


class Cleared(msgspec.Struct, tag="cleared", frozen=True, gc=False):
    """No block can be found any more."""


class Chunk(msgspec.Struct, frozen=True):
    """Of a snapshot: its place among `count` chunks, and the blocks of all of them."""

    index: int
    count: int
    num_blocks: int


class CacheBatch(msgspec.Struct, frozen=True):
    """What became of blocks. `number`s follow each other; `timestamp` is when it was heard, in seconds since 1970.

    They begin at the microseconds since 1970, so that who followed an engine that is gone is not taken to follow this.
    `snapshot` is set where this is a part of the state, as of the number of its last chunk, and what was known before
    is void: the first chunk begins with `Cleared`, then come all blocks, parents before children.
    """

    number: int
    timestamp: float
    events: Sequence[Stored | Removed | Cleared]
    snapshot: Chunk | None = None


class CacheWatch:
    """Hears the engine's `CacheEvents`; `watch` tells them. Off, it neither hears nor tells anything.

    Nobody chooses the pool that a request goes to, so a block is cached as long as any pool has it. Numbers go on from
    `numbers_from`, by default the microseconds since 1970.
    Belongs to one event loop. `history` is how many events are remembered at most, the last batch whatever it has.
    """

    def __init__(
        self,
        block_size: int,
        *,
        on: bool,
        history: int = HISTORY_EVENTS,
        clock: Callable[[], float] = time.time,
        numbers_from: int | None = None,
    ) -> None:
        self._block_bytes = 4 * block_size
        self._on = on
        self._most = history
        self._clock = clock
        self._live: dict[int, Stored] = {}  # by hash, parents mostly before children
        self._held: dict[int, set[int]] = {}  # the hashes of each pool's own
        self._batches: dict[int, CacheBatch] = {}
        self._number = int(clock() * 1e6) if numbers_from is None else numbers_from
        self._oldest = self._number + 1
        self._num_events = 0
        self._news = asyncio.Event()
        self._over: RequestError | None = None
        self._add([Cleared()])

    # What is heard -------------------------------------------------------------------------------

    def hear(self, heard: CacheEvents) -> None:
        """The engine has said what became of its blocks."""
        held = self._held.setdefault(heard.pool, set())
        events: list[Stored | Removed | Cleared] = []
        at = 0
        for name, parent, change, chained in heard.entries():
            if change == CacheChange.STORED:
                tokens = heard.token_ids[at : at + self._block_bytes]
                at += self._block_bytes
                held.add(name)
                if name not in self._live:
                    self._live[name] = block = Stored(name, parent if chained else None, tokens)
                    events.append(block)
            elif change == CacheChange.REMOVED:
                held.remove(name)
                events += self._gone([name])
            else:
                gone = list(held)
                held.clear()
                events += self._gone(gone) if any(self._held.values()) else self._cleared()
        # No batch has more events than a chunk has blocks: so a snapshot never has more chunks than there are numbers.
        for first in range(0, len(events), CHUNK_EVENTS):
            self._add(events[first : first + CHUNK_EVENTS])

    def lost(self) -> None:
        """The engine is gone, and with it its cache."""
        self._held.clear()
        self._add(self._cleared())

    def _gone(self, names: Iterable[int]) -> list[Stored | Removed | Cleared]:
        """A pool has these no more: those that no other one has are removed."""
        gone = [name for name in names if not any(name in held for held in self._held.values())]
        for name in gone:
            del self._live[name]
        return [Removed(name) for name in gone]

    def _cleared(self) -> list[Stored | Removed | Cleared]:
        self._live.clear()
        return [Cleared()]

    def end(self, error: RequestError) -> None:
        """Nothing will be heard any more: who watches gets this once everything was told."""
        self._over = error
        self._wake()

    def _add(self, events: Sequence[Stored | Removed | Cleared]) -> None:
        self._number += 1
        self._batches[self._number] = CacheBatch(self._number, self._clock(), events)
        self._num_events += len(events)
        while self._num_events > self._most and self._oldest < self._number:
            self._num_events -= len(self._batches.pop(self._oldest).events)
            self._oldest += 1
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    # What is told --------------------------------------------------------------------------------

    def watch(self, start: int = 0) -> AsyncIterator[CacheBatch]:
        """See `AsyncEngine.watch_cache`."""
        if not self._on:
            raise ConfigError("which KV blocks are cached is only known with --cache-events")
        return self._tell(start)

    async def _tell(self, last: int) -> AsyncIterator[CacheBatch]:
        while True:
            if last == self._number:
                if self._over is not None:
                    raise self._over
                await self._news.wait()
            elif self._oldest <= last + 1 <= self._number:
                last += 1
                yield self._batches[last]
            else:
                for chunk in self._snapshot():
                    last = chunk.number
                    yield chunk

    def _snapshot(self) -> list[CacheBatch]:
        blocks = _parents_first(self._live)
        parts: list[list[Stored | Removed | Cleared]] = [
            [*blocks[first : first + CHUNK_EVENTS]] for first in range(0, max(len(blocks), 1), CHUNK_EVENTS)
        ]
        parts[0].insert(0, Cleared())
        now, before = self._clock(), self._number - len(parts)
        return [
            CacheBatch(before + index + 1, now, events, Chunk(index, len(parts), len(blocks)))
            for index, events in enumerate(parts)
        ]


def _parents_first(live: dict[int, Stored]) -> list[Stored]:
    """The blocks, each behind its parent if that is there: a parent may have been removed and stored again later."""
    placed: dict[int, Stored] = {}
    for name, block in live.items():
        if block.parent in placed or block.parent not in live:  # nearly always
            placed[name] = block
            continue
        chain = [block]
        while (parent := chain[-1].parent) is not None and parent in live and parent not in placed:
            chain.append(live[parent])
        for each in reversed(chain):
            placed[each.hash] = each
    return list(placed.values())
