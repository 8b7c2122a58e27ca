"""A seed gives the same text alone, in a batch, and after a preemption; constraints hold end to end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.toy import VOCAB_SIZE, toy_llama
from tokenspeed import AsyncEngine, EngineConfig, RequestOutput, SamplingParams
from tokenspeed.engine.llm import merge

BLOCK = 16
BLOCK_BYTES = BLOCK * 3 * 2 * 2 * 16 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    toy_llama(path, seed=11)
    return path


def config(folder: Path, blocks: int = 512) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        dtype="float32",
        block_size=BLOCK,
        max_num_batched_tokens=256,
        num_threads=2,
        kv_cache_bytes=blocks * BLOCK_BYTES,
    )


def prompt(index: int) -> list[int]:
    return [3 + (index * 37 + position * 11) % (VOCAB_SIZE - 3) for position in range(20 + 9 * index)]


async def whole(engine: AsyncEngine, ids: list[int], params: SamplingParams) -> list[RequestOutput]:
    found: dict[int, RequestOutput] = {}
    async for out in engine.generate(ids, params):
        found[out.index] = merge(found.get(out.index), out)
    return [found[index] for index in sorted(found)]


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=0.9,
        top_p=0.95,
        top_k=50,
        repetition_penalty=1.1,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        seed=seed,
        max_tokens=48,
        ignore_eos=True,
    )


def test_a_seed_gives_the_same_text_alone_batched_and_preempted(folder: Path) -> None:
    async def run(blocks: int, *, together: bool) -> tuple[list[list[int]], int]:
        async with AsyncEngine(config(folder, blocks), in_process=True) as engine:
            jobs = [whole(engine, prompt(index), seeded(index)) for index in range(10)]
            outs = await asyncio.gather(*jobs) if together else [await job for job in jobs]
            return [out[0].token_ids for out in outs], engine.stats().num_preemptions

    alone, _ = asyncio.run(run(512, together=False))
    batched, none = asyncio.run(run(512, together=True))
    preempted, some = asyncio.run(run(20, together=True))
    assert none == 0 and some > 0
    assert alone == batched == preempted
    assert len({tuple(tokens) for tokens in alone}) == 10


def test_choices_of_one_request_differ_and_are_reproducible(folder: Path) -> None:
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=12, ignore_eos=True)

    async def run() -> list[list[RequestOutput]]:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            return [await whole(engine, prompt(2), params) for _ in range(2)]

    first, second = asyncio.run(run())
    assert [out.index for out in first] == [0, 1, 2]
    assert [out.token_ids for out in first] == [out.token_ids for out in second]
    assert len({tuple(out.token_ids) for out in first}) == 3


def test_constraints_hold(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            allowed = SamplingParams(allowed_token_ids=(40, 41, 42), max_tokens=20, seed=1, ignore_eos=True)
            assert set((await whole(engine, prompt(0), allowed))[0].token_ids) <= {40, 41, 42}

            pushed = SamplingParams(logit_bias={99: 100.0}, max_tokens=5, temperature=0.0)
            assert (await whole(engine, prompt(0), pushed))[0].token_ids == [99] * 5

            free = (await whole(engine, prompt(1), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)))[0]
            banned = SamplingParams(
                temperature=0.0, max_tokens=8, ignore_eos=True, bad_word_ids=((free.token_ids[0], free.token_ids[1]),)
            )
            other = (await whole(engine, prompt(1), banned))[0].token_ids
            assert other[0] == free.token_ids[0] and other[1] != free.token_ids[1]

            stopped = SamplingParams(temperature=0.0, max_tokens=8, stop_token_ids=(free.token_ids[3],))
            out = (await whole(engine, prompt(1), stopped))[0]
            assert out.token_ids == free.token_ids[:4]
            assert (out.finish_reason, out.stop_reason) == ("stop", free.token_ids[3])

            later = SamplingParams(temperature=0.0, max_tokens=8, min_tokens=6, stop_token_ids=(free.token_ids[3],))
            out = (await whole(engine, prompt(1), later))[0]
            assert free.token_ids[3] not in out.token_ids[:5] and out.num_output_tokens >= 6

    asyncio.run(run())


def test_logprobs_of_prompt_and_output_are_the_models_own(folder: Path) -> None:
    ids = prompt(5)

    async def run(**changes: int) -> RequestOutput:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            await whole(engine, ids, SamplingParams(temperature=0.0, max_tokens=1))
            params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
            return (await whole(engine, ids, params))[0]

    out = asyncio.run(run())
    assert out.num_cached_tokens == 0, "scoring a prompt computes all of it"
    assert out.prompt_logprobs is not None and len(out.prompt_logprobs) == len(ids)
    assert out.prompt_logprobs[0] is None
    for position, entry in enumerate(out.prompt_logprobs[1:], start=1):
        assert entry is not None and entry.token_id == ids[position] and entry.logprob <= 0
        assert len(entry.top_ids) == 2 and entry.top_logprobs[0] >= entry.top_logprobs[1]
    assert out.logprobs is not None and len(out.logprobs) == 6
    for token, entry in zip(out.token_ids, out.logprobs, strict=True):
        assert entry.token_id == token == entry.top_ids[0] and entry.rank == 1
        assert entry.logprob == pytest.approx(entry.top_logprobs[0])


def test_a_stop_string_ends_the_request_and_is_not_shown(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            free = (await whole(engine, prompt(3), SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)))[0]
            middle = len(free.text) // 2
            stop = free.text[middle : middle + 3]
            where = free.text.index(stop)
            params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, stop=(stop,))
            out = (await whole(engine, prompt(3), params))[0]
            assert out.text == free.text[:where]
            assert (out.finish_reason, out.stop_reason) == ("stop", stop)
            assert out.num_output_tokens == len(out.token_ids) < 40
            await asyncio.sleep(0.3)
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)

    asyncio.run(run())
