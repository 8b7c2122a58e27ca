"""An engine of two ranks that attend to requests of their own and share the rest: it answers like one rank, whoever has
work, and goes down as one. With dense layers on two GPUs, where there are as many; experts are compared in float32,
which no kernel of a GPU has."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tests.engine.test_cache_watch import Follower
from tests.engine.test_ranks import (
    BLOCK,
    GREEDY,
    LONG,
    NUM_TOKENS,
    ON_GPUS,
    PROMPTS,
    SIZES,
    Case,
    all_kinds,
    changed,
    gone,
    tokens,
)
from tests.models.families import write
from tests.toy import greedy, toy_llama
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams
from tokenspeed._core.replay import replay
from tokenspeed.config import Parallel
from tokenspeed.engine.link import ProcessLink
from tokenspeed.errors import InvalidRequest, Unavailable

NUM_BLOCKS = 24
GROUPS = Parallel(world=2, attn_dp=2, moe_ep=2)
DENSE_GROUPS = Parallel(world=2, attn_dp=2, dense_tp=2)


@pytest.fixture(autouse=True)
def on_a_cpu_with_every_plan_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSPEED_DEVICE", "cpu")
    monkeypatch.setenv("TOKENSPEED_DEBUG", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """A checkpoint of a family, as both groups have it, and what `transformers` says; made once."""

    @functools.cache
    def make(family: str) -> Case:
        folder = tmp_path_factory.mktemp(family)
        dense = family == "llama"
        reference = toy_llama(folder) if dense else write(folder, family, seed=3)
        config = EngineConfig(
            model=str(folder), dtype="float32", block_size=BLOCK, num_threads=1, kv_cache_bytes=block_bytes(family),
            overlap=0 if family == "qwen3-moe" else 1, parallel=DENSE_GROUPS if dense else GROUPS, **SIZES,
        )  # fmt: skip
        return Case(config, [greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS])

    return make


def block_bytes(family: str) -> int:
    """Of all of a group's blocks in float32, which its one rank has whole."""
    return NUM_BLOCKS * 3 * (32 + 16 if family == "deepseek-v3" else 2 * 2 * 16) * BLOCK * 4


async def at_once(engine: AsyncEngine, case: Case, which: Sequence[int]) -> None:
    got = await asyncio.gather(*(tokens(engine, PROMPTS[prompt]) for prompt in which))
    assert got == [case.expected[prompt] for prompt in which]


@pytest.mark.parametrize("family", ["llama", "deepseek-v3", "qwen3-moe"])
def test_groups_answer_like_one_rank(
    made: Callable[[str], Case], family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities, grammars and seeds among it, of either group's requests."""
    case = made(family)
    if family == "llama" and ON_GPUS:
        monkeypatch.delenv("TOKENSPEED_DEVICE")

    async def by_one_rank() -> list[object]:
        alone = changed(case.config, parallel=Parallel(), kv_cache_bytes=None)
        async with AsyncEngine(alone, in_process=True) as engine:
            return await all_kinds(engine)

    async def by_groups() -> list[list[object]]:
        config = changed(case.config, record=str(tmp_path / "calls"))
        async with AsyncEngine(config, in_process=True) as engine:
            assert engine.facts.num_blocks == 2 * NUM_BLOCKS
            await at_once(engine, case, [0])  # the other group has nothing to do, ever
            assert min(pool.blocks_total for pool in engine.stats().pools) == NUM_BLOCKS
            await at_once(engine, case, [0, 1, 2, 3, 0, 1])
            kinds = [await all_kinds(engine)]
            ahead = await engine.submit(PROMPTS[1], LONG)  # so that requests fall to the other groups
            await anext(ahead)
            kinds.append(await all_kinds(engine))
            await ahead.abort()
            await at_once(engine, case, [3])
            assert (engine.stats().running, engine.stats().blocks_used) == (0, 0)
            assert engine.stats().num_aborts == 1
            return kinds

    wanted = asyncio.run(by_one_rank())
    assert asyncio.run(by_groups()) == [wanted, wanted]
    again = replay(tmp_path / "calls", check=True)
    assert again.difference is None and again.calls > 100


def test_turns_of_a_session_find_their_cache_in_their_own_pool(made: Callable[[str], Case]) -> None:
    system = list(range(50, 82))  # two blocks, which all begin with
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)

    async def run() -> None:
        async with AsyncEngine(made("deepseek-v3").config, in_process=True) as engine:
            conversations = [[*system, *range(100 + 70 * agent, 160 + 70 * agent)] for agent in range(2)]
            for turn in range(3):
                before = engine.stats()
                streams = [await engine.submit(prompt, params) for prompt in conversations]
                firsts = [await anext(stream) for stream in streams]
                assert [pool.running for pool in engine.stats().pools] == [1, 1], f"turn {turn}"
                for conversation, stream, first in zip(conversations, streams, firsts, strict=True):
                    rest = [token async for output in stream for token in output.token_ids]
                    conversation.extend([*first.token_ids, *rest, 7, 8, 9])
                after = engine.stats()
                hits, asked = after.cached_tokens - before.cached_tokens, after.prompt_tokens - before.prompt_tokens
                assert turn == 0 or hits > asked - 2 * (3 + 1 + BLOCK), "all but the message and a part of a block"
            with pytest.raises(InvalidRequest, match="--attn-dp-size"):
                await engine.submit([1, 2], GREEDY, tps_floor=10.0)
            dropped = await engine.drop_cached()
            assert dropped.num_blocks > 8 and dropped.num_held == 0
            while engine.stats().blocks_cached:  # until the next heartbeat
                await asyncio.sleep(0.05)
            for pool in engine.stats().pools:
                left = (pool.running, pool.waiting, pool.blocks_total, pool.blocks_used, pool.blocks_cached)
                assert left == (0, 0, NUM_BLOCKS, 0, 0) and 0 < pool.cached_tokens < pool.prompt_tokens

    asyncio.run(run())


def test_what_is_cached_is_told_of_all_pools_together(made: Callable[[str], Case]) -> None:
    config = changed(made("deepseek-v3").config, cache_events=True)
    long = SamplingParams(temperature=0.0, max_tokens=2 * BLOCK, ignore_eos=True)

    async def run() -> None:
        async with AsyncEngine(config, in_process=True) as engine:
            follower = Follower(engine.watch_cache())
            for at in range(2):
                ahead = await engine.submit(PROMPTS[at], long)
                await anext(ahead)
                assert await tokens(engine, PROMPTS[1 - at]) == made("deepseek-v3").expected[1 - at]
                await ahead.abort()
            while (cached := engine.stats().blocks_cached) == 0 or engine.stats().blocks_used:  # until a heartbeat
                await asyncio.sleep(0.05)
            each = [pool.blocks_cached for pool in engine.stats().pools]
            await follower.read(engine._cache._number)
            assert min(each) > 0 and max(each) < len(follower.live) <= sum(each) == cached
            assert min(pool.prompt_tokens for pool in engine.stats().pools) > 0
            assert engine.stats().prompt_tokens == sum(pool.prompt_tokens for pool in engine.stats().pools)
            await engine.drop_cached()
            await follower.until(0)

    asyncio.run(run())


def test_when_a_group_dies_both_go_down(made: Callable[[str], Case]) -> None:
    link = ProcessLink(log_level="critical")
    config = changed(made("deepseek-v3").config, watchdog_seconds=20.0)

    async def run() -> None:
        async with AsyncEngine(config, link=link) as engine:
            streams = [await engine.submit(PROMPTS[at], LONG) for at in range(2)]
            for stream in streams:
                await anext(stream)
            assert link.pid is not None
            pids = [link.pid, *(child.pid for child in psutil.Process(link.pid).children())]
            assert len(pids) == 2
            os.kill(pids[1], signal.SIGKILL)
            async with asyncio.timeout(20):
                for stream in streams:  # of either group
                    with pytest.raises(Unavailable):
                        async for _ in stream:
                            pass
            assert "rank 1 was killed by signal 9" in (engine.health().error or "")
            assert await asyncio.to_thread(gone, pids)

    asyncio.run(run())


def test_ranks_of_a_group_share_what_its_first_decides(tmp_path: Path) -> None:
    """Two groups of two: attention is cut within a group, experts are dealt to all."""
    reference = write(tmp_path, "qwen3-moe", seed=4)
    config = EngineConfig(
        model=str(tmp_path), dtype="float32", block_size=BLOCK, max_num_batched_tokens=64, num_threads=1,
        parallel=Parallel(world=4, attn_dp=2, moe_ep=4),
    )  # fmt: skip
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=1)

    async def run() -> list[list[int]]:
        async with AsyncEngine(config, in_process=True) as engine:
            return list(await asyncio.gather(*(tokens(engine, prompt, params) for prompt in PROMPTS[:3])))

    assert asyncio.run(run()) == [greedy(reference, prompt, 8) for prompt in PROMPTS[:3]]
