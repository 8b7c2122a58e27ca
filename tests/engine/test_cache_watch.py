"""Who follows the prefix cache: numbered batches, a bounded memory of them, the whole state for who has missed some."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.engine.test_async_engine import SHORT, config
from tests.toy import toy_llama
from tokenspeed import AsyncEngine, EngineConfig
from tokenspeed.batch import CACHE_RECORD, CacheChange, CacheEvents
from tokenspeed.engine.cache_watch import CHUNK_EVENTS, CacheBatch, CacheWatch, Cleared, Removed, Stored
from tokenspeed.engine.link import ProcessLink
from tokenspeed.engine.supervisor import SupervisedLink
from tokenspeed.errors import ConfigError, Unavailable

SIZE = 2
TIME = 1234.5


def tokens_of(name: int) -> bytes:
    return np.array([name, name + 1], np.int32).tobytes()


def stored(*blocks: tuple[int, int | None], pool: int = 0) -> CacheEvents:
    """What the engine says of new blocks, (hash, parent) each."""
    records = [(name, parent or 0, CacheChange.STORED, parent is not None) for name, parent in blocks]
    return CacheEvents(
        pool, np.array(records, CACHE_RECORD).tobytes(), b"".join(tokens_of(name) for name, _ in blocks)
    )


def removed(*names: int, pool: int = 0) -> CacheEvents:
    records = [(name, 0, CacheChange.REMOVED, 0) for name in names]
    return CacheEvents(pool, np.array(records, CACHE_RECORD).tobytes(), b"")


def cleared(pool: int = 0) -> CacheEvents:
    return CacheEvents(pool, np.array([(0, 0, CacheChange.CLEARED, 0)], CACHE_RECORD).tobytes(), b"")


def chain(first: int, count: int) -> CacheEvents:
    return stored(*((name, name - 1 if name > first else None) for name in range(first, first + count)))


class Follower:
    """Someone who follows, and what it takes for cached."""

    def __init__(self, batches: AsyncIterator[CacheBatch], start: int = 0) -> None:
        self._batches = batches
        self.number = start
        self.snapshots = 0
        self.live: dict[int, Stored] = {}

    async def read(self, up_to: int) -> list[CacheBatch]:
        """All batches up to that number."""
        read = []
        while self.number < up_to:
            batch = await asyncio.wait_for(anext(self._batches), 20)
            self.take(batch)
            read.append(batch)
        return read

    async def until(self, blocks: int) -> None:
        """Read until there are so many."""
        while len(self.live) != blocks:
            await self.read(self.number + 1)

    def take(self, batch: CacheBatch) -> None:
        if batch.snapshot is None or batch.snapshot.index:
            assert batch.number == self.number + 1, "a gap"
        else:
            self.snapshots += 1
            self.live.clear()
        self.number = batch.number
        live = self.live
        for event in batch.events:
            match event:
                case Stored(hash=name, parent=parent):
                    assert name not in live
                    assert batch.snapshot is None or parent is None or parent in live, "a child before its parent"
                    live[name] = event
                case Removed(hash=name):
                    del live[name]
                case Cleared():
                    live.clear()


def new_watch(history: int = 100) -> CacheWatch:
    return CacheWatch(SIZE, on=True, history=history, clock=lambda: TIME, numbers_from=0)


def test_batches_are_numbered_and_say_what_became_of_which_blocks() -> None:
    async def run() -> None:
        watch = new_watch()
        follower = Follower(watch.watch())
        watch.hear(stored((7, None), (-8, 7)))
        watch.hear(removed(-8))
        watch.hear(stored((9, None), pool=1))
        assert await follower.read(4) == [
            CacheBatch(1, TIME, [Cleared()]),
            CacheBatch(2, TIME, [Stored(7, None, tokens_of(7)), Stored(-8, 7, tokens_of(-8))]),
            CacheBatch(3, TIME, [Removed(-8)]),
            CacheBatch(4, TIME, [Stored(9, None, tokens_of(9))]),
        ]

    asyncio.run(run())


def test_a_block_is_cached_as_long_as_any_pool_has_it() -> None:
    async def run() -> None:
        watch = new_watch()
        follower = Follower(watch.watch())
        watch.hear(stored((1, None), (2, 1)))
        watch.hear(stored((1, None), (3, 1), pool=1))
        watch.hear(removed(1))
        assert [batch.events for batch in (await follower.read(3))[1:]] == [
            [Stored(1, None, tokens_of(1)), Stored(2, 1, tokens_of(2))],
            [Stored(3, 1, tokens_of(3))],
        ]
        watch.hear(stored((1, None)))
        watch.hear(cleared(pool=1))  # the first pool has 1 and 2
        watch.hear(removed(1))
        watch.hear(cleared())
        assert [batch.events for batch in await follower.read(6)] == [[Removed(3)], [Removed(1)], [Cleared()]]
        assert follower.live == watch._live == {}

    asyncio.run(run())


def test_who_followed_an_engine_that_is_gone_is_shown_the_state_of_the_next() -> None:
    async def run() -> None:
        before = CacheWatch(SIZE, on=True, clock=lambda: TIME)
        follower = Follower(before.watch())
        before.hear(stored((1, None)))
        await follower.until(1)
        after = CacheWatch(SIZE, on=True, clock=lambda: TIME + 60)
        for name in range(10, 15):
            after.hear(stored((name, None)))
        batch = await anext(after.watch(follower.number))
        assert batch.snapshot is not None and batch.events[0] == Cleared() and len(batch.events) == 6

    asyncio.run(run())


def test_who_waits_hears_of_a_batch_and_several_follow_each_at_its_pace() -> None:
    async def run() -> None:
        watch = new_watch()
        quick, slow = Follower(watch.watch()), Follower(watch.watch())
        await quick.read(1)
        waiting = asyncio.create_task(quick.read(2))
        await asyncio.sleep(0)
        assert not waiting.done()
        watch.hear(chain(1, 3))
        assert [batch.number for batch in await waiting] == [2]
        watch.hear(removed(3))
        await quick.read(3)
        await slow.read(3)
        assert quick.live == slow.live and list(quick.live) == [1, 2]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("start", "numbers", "snapshots"),
    [(0, [6], 1), (3, [4, 5, 6], 0), (2, [6], 1), (5, [6], 0), (99, [6], 1), (-4, [6], 1)],
)
def test_a_reader_goes_on_where_it_was_if_that_is_remembered(start: int, numbers: list[int], snapshots: int) -> None:
    async def run() -> None:
        watch = new_watch(history=3)
        for name in range(1, 6):
            watch.hear(stored((name, name - 1 or None)))
        follower = Follower(watch.watch(start), start)
        batch = await asyncio.wait_for(anext(watch.watch(start)), 1)
        assert (batch.snapshot is not None) == snapshots
        if snapshots:
            follower.number = 0
        assert [batch.number for batch in await follower.read(6)] == numbers
        if snapshots:
            assert list(follower.live) == [1, 2, 3, 4, 5]

    asyncio.run(run())


def test_a_reader_that_is_up_to_date_waits() -> None:
    async def run() -> None:
        watch = new_watch(history=1)
        watch.hear(stored((1, None)))
        waiting = asyncio.ensure_future(anext(watch.watch(2)))
        await asyncio.sleep(0)
        assert not waiting.done()
        watch.hear(stored((2, 1)))
        assert (await waiting).number == 3

    asyncio.run(run())


def test_a_snapshot_has_all_blocks_in_chunks_and_what_follows_goes_on_behind_it() -> None:
    async def run() -> None:
        watch = new_watch(history=10)
        blocks = 2 * CHUNK_EVENTS + 5
        watch.hear(chain(1, blocks))
        watch.hear(removed(blocks))
        watch.hear(stored((-1, None), pool=1))
        follower = Follower(watch.watch())
        chunks = await follower.read(6)
        assert [(each.number, len(each.events)) for each in chunks] == [
            (4, CHUNK_EVENTS + 1), (5, CHUNK_EVENTS), (6, 5)
        ]  # fmt: skip
        assert [each.snapshot and each.snapshot.index for each in chunks] == [0, 1, 2]
        assert all(each.snapshot and (each.snapshot.count, each.snapshot.num_blocks) == (3, blocks) for each in chunks)
        assert chunks[0].events[0] == Cleared()
        watch.hear(removed(blocks - 1))
        assert [batch.number for batch in await follower.read(7)] == [7]
        assert len(follower.live) == blocks - 1

    asyncio.run(run())


def test_a_snapshot_has_parents_before_children_however_they_came() -> None:
    async def run() -> None:
        watch = new_watch(history=1)
        watch.hear(chain(1, 4))
        watch.hear(removed(1, 2))
        watch.hear(stored((1, None), (2, 1)))  # 3 and 4 lay there meanwhile
        watch.hear(stored((50, 49)))  # its parent is gone
        batch = await anext(watch.watch())
        order = [event.hash for event in batch.events if isinstance(event, Stored)]
        assert sorted(order) == [1, 2, 3, 4, 50]
        assert [order.index(name) for name in (1, 2, 3, 4)] == sorted(order.index(name) for name in (1, 2, 3, 4))

    asyncio.run(run())


def test_a_slow_reader_is_shown_the_state_instead_of_what_was_forgotten() -> None:
    async def run() -> None:
        watch = new_watch(history=4)
        follower = Follower(watch.watch())
        await follower.read(1)
        for name in range(1, 40):
            watch.hear(stored((name, None)))
            if name > 5:
                watch.hear(removed(name - 5))
        await follower.read(1 + 39 + 34)
        assert follower.snapshots == 1 and list(follower.live) == [35, 36, 37, 38, 39]
        assert len(watch._batches) <= 4

    asyncio.run(run())


def test_who_reads_through_a_snapshot_while_more_happens_misses_nothing() -> None:
    async def run() -> None:
        watch = new_watch(history=3 * CHUNK_EVENTS)
        watch.hear(chain(1, 4 * CHUNK_EVENTS))
        follower = Follower(watch.watch())
        for at in range(30):
            watch.hear(removed(4 * CHUNK_EVENTS - at))
            watch.hear(stored((10_000 + at, None)))
            await follower.read(follower.number + 1 if follower.number else 1)
        await follower.read(watch._number)
        assert follower.live == watch._live

    asyncio.run(run())


def test_the_end_of_an_engine_is_told_behind_everything_else() -> None:
    async def run() -> None:
        watch = new_watch()
        watch.hear(stored((1, None)))
        watch.hear(stored((1, None), pool=2))
        watch.lost()
        follower = Follower(watch.watch())
        last = (await follower.read(3))[2:]
        assert [each.events for each in last] == [[Cleared()]] and not follower.live
        waiting = asyncio.create_task(follower.read(4))
        await asyncio.sleep(0)
        watch.end(Unavailable("it is over"))
        with pytest.raises(Unavailable, match="it is over"):
            await waiting
        with pytest.raises(Unavailable):
            await Follower(watch.watch(3), 3).read(4)

    asyncio.run(run())


# --- a whole engine ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    toy_llama(path)
    return path


async def serve(engine: AsyncEngine, prompt: Sequence[int], salt: str = "") -> list[int]:
    """A prompt and what follows it."""
    answer = [token async for each in engine.generate(prompt, SHORT, cache_salt=salt) for token in each.token_ids]
    return [*prompt, *answer]


def texts(live: dict[int, Stored]) -> dict[int, list[int]]:
    """Of each block all tokens up to its end."""
    whole: dict[int, list[int]] = {}
    for name, block in live.items():
        before = [] if block.parent is None else whole[block.parent]
        whole[name] = before + np.frombuffer(block.token_ids, np.int32).tolist()
    return whole


@pytest.mark.parametrize("in_process", [True, False])
def test_what_an_engine_caches_can_be_followed(folder: Path, in_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSPEED_DEBUG", "1")

    async def run() -> None:
        async with AsyncEngine(config(folder, cache_events=True), in_process=in_process) as engine:
            follower = Follower(engine.watch_cache())
            first = await serve(engine, range(5, 55))
            await follower.until(3)
            await serve(engine, range(60, 100), salt="somebody")
            second = await serve(engine, [*first[:40], *range(100, 140)])
            await follower.until(6)
            known = sorted(texts(follower.live).values(), key=lambda tokens: (len(tokens), tokens))
            expected = [tokens[:end] for tokens in (first, second) for end in range(16, len(tokens), 16)]
            assert known == sorted(map(list, set(map(tuple, expected))), key=lambda tokens: (len(tokens), tokens))
            await engine.drop_cached()
            await follower.until(0)
            last = follower.number
            await serve(engine, range(5, 55))
            late = Follower(engine.watch_cache(last), last)
            await late.read(last + 1)
            assert late.snapshots == 0 and len(late.live) == 3
            stats = engine.stats()
            assert (stats.waiting_uncached_tokens, stats.blocks_used) == (0, 0)
        with pytest.raises(Unavailable):
            await follower.read(follower.number + 10_000)

    asyncio.run(run())


def test_an_engine_that_starts_again_has_nothing_cached(folder: Path) -> None:
    async def run() -> None:
        links: list[ProcessLink] = []

        def make() -> ProcessLink:
            links.append(ProcessLink(log_level="critical"))
            return links[-1]

        async with AsyncEngine(config(folder, cache_events=True), link=SupervisedLink(make, restarts=1)) as engine:
            follower = Follower(engine.watch_cache())
            await serve(engine, range(5, 55))
            await follower.until(3)
            assert links[0].pid is not None
            os.kill(links[0].pid, signal.SIGKILL)
            await follower.until(0)
            while engine.health().state != "ready":
                await asyncio.sleep(0.05)
            await serve(engine, range(5, 55))
            await follower.until(3)
            assert follower.snapshots == 1, "the first, of a cache without blocks"

    asyncio.run(run())


def test_an_engine_that_keeps_no_account_says_so(folder: Path) -> None:
    engine = AsyncEngine(config(folder))
    with pytest.raises(ConfigError, match="--cache-events"):
        engine.watch_cache()
    with pytest.raises(ConfigError, match="nothing to tell"):
        EngineConfig(cache_events=True, enable_prefix_caching=False).check()
