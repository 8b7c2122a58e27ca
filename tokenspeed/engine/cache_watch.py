"""Which KV blocks the engine has cached, for whoever follows that: a mirror of its prefix cache, and its last changes.

Those who follow read one history, each at its own place in it. Who falls behind its beginning is shown the whole state
and goes on from there, so that a slow reader costs no memory.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence

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
    """No block of this pool can be found any more."""


class Chunk(msgspec.Struct, frozen=True):
    """Of a snapshot: its place among `count` chunks, and the blocks of all of them."""

    index: int
    count: int
    num_blocks: int


class CacheBatch(msgspec.Struct, frozen=True):
    """What became of the blocks of one pool. `number`s follow each other from 1 on, over all pools; `timestamp` is when
    it was heard, in seconds since 1970.

    `snapshot` is set where this is a part of the state, as of the number of its last chunk, and what was known before
    is void: the first chunk of each pool begins with `Cleared`, then come all its blocks, parents before children.
    """

    number: int
    pool: int
    timestamp: float
    events: Sequence[Stored | Removed | Cleared]
    snapshot: Chunk | None = None


class CacheWatch:
    """Hears the engine's `CacheEvents`; `watch` tells them. Off, it neither hears nor tells anything.

    Belongs to one event loop. `history` is how many events are remembered at most, the last batch whatever it has.
    """

    def __init__(
        self, block_size: int, *, on: bool, history: int = HISTORY_EVENTS, clock: Callable[[], float] = time.time
    ) -> None:
        self._block_bytes = 4 * block_size
        self._on = on
        self._most = history
        self._clock = clock
        self._live: dict[int, dict[int, Stored]] = {0: {}}  # of each pool, by hash
        self._batches: dict[int, CacheBatch] = {}
        self._oldest = 1
        self._number = 0
        self._num_events = 0
        self._news = asyncio.Event()
        self._over: RequestError | None = None
        self._add(0, [Cleared()])

    # What is heard -------------------------------------------------------------------------------

    def hear(self, heard: CacheEvents) -> None:
        """The engine has said what became of its blocks."""
        live = self._live.setdefault(heard.pool, {})
        events: list[Stored | Removed | Cleared] = []
        at = 0
        for name, parent, change, chained in heard.entries():
            if change == CacheChange.STORED:
                tokens = heard.token_ids[at : at + self._block_bytes]
                at += self._block_bytes
                live[name] = block = Stored(name, parent if chained else None, tokens)
                events.append(block)
            elif change == CacheChange.REMOVED:
                del live[name]
                events.append(Removed(name))
            else:
                live.clear()
                events.append(Cleared())
        # No batch has more events than a chunk has blocks: so a snapshot never has more chunks than there are numbers.
        for first in range(0, len(events), CHUNK_EVENTS):
            self._add(heard.pool, events[first : first + CHUNK_EVENTS])

    def lost(self) -> None:
        """The engine is gone, and with it its cache."""
        for pool, live in self._live.items():
            live.clear()
            self._add(pool, [Cleared()])

    def end(self, error: RequestError) -> None:
        """Nothing will be heard any more: who watches gets this once everything was told."""
        self._over = error
        self._wake()

    def _add(self, pool: int, events: Sequence[Stored | Removed | Cleared]) -> None:
        self._number += 1
        self._batches[self._number] = CacheBatch(self._number, pool, self._clock(), events)
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
        parts: list[tuple[int, list[Stored | Removed | Cleared]]] = []
        for pool, live in self._live.items():
            blocks = _parents_first(live)
            for first in range(0, max(len(blocks), 1), CHUNK_EVENTS):
                cleared = [Cleared()] if first == 0 else []
                parts.append((pool, [*cleared, *blocks[first : first + CHUNK_EVENTS]]))
        num_blocks = sum(len(live) for live in self._live.values())
        now, before = self._clock(), self._number - len(parts)
        return [
            CacheBatch(before + index + 1, pool, now, events, Chunk(index, len(parts), num_blocks))
            for index, (pool, events) in enumerate(parts)
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
