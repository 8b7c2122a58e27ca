"""Greedy tokens equal those of `transformers`, in float32, under every condition that serving brings."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from tests.toy import VOCAB_SIZE, greedy, toy_llama
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams

NUM_PROMPTS = 20
NUM_TOKENS = 40
BLOCK = 16
BYTES_PER_TOKEN = 3 * 2 * 2 * 16 * 4
"""Of the toy model's KV cache in float32: layers, keys and values, heads, dimensions."""


def prompts() -> list[list[int]]:
    """Lengths around block borders, several blocks long, some sharing a long prefix."""
    draw = random.Random(7)
    shared = [draw.randrange(3, VOCAB_SIZE) for _ in range(5 * BLOCK + 3)]
    lengths = [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 1, 100, 150, 200, 257, 301]
    alone = [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in lengths]
    forked = [shared + [draw.randrange(3, VOCAB_SIZE) for _ in range(tail)] for tail in (1, 2, 13, 14, 30, 45, 60, 99)]
    return alone + forked


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], list[list[int]]]:
    """The toy model's folder, the prompts, and what `transformers` says to each."""
    folder = tmp_path_factory.mktemp("llama")
    reference = toy_llama(folder, seed=3)
    asked = prompts()
    assert len(asked) == NUM_PROMPTS
    expected = [greedy(reference, prompt, NUM_TOKENS) for prompt in asked]
    assert all(len(set(tokens)) >= 15 for tokens in expected), "a model that repeats itself proves nothing"
    return folder, asked, expected


def config(folder: Path, **changes: object) -> EngineConfig:
    settings: dict[str, object] = {
        "model": str(folder),
        "dtype": "float32",
        "block_size": BLOCK,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 32,
        "num_threads": 2,
        "kv_cache_bytes": 32 << 20,
    }
    settings.update(changes)
    return EngineConfig(**settings)  # type: ignore[arg-type]


async def one(engine: AsyncEngine, prompt: list[int], num_tokens: int = NUM_TOKENS) -> tuple[list[int], int]:
    """The tokens of one greedy request, and how many prompt tokens came from the cache."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    tokens: list[int] = []
    cached = 0
    async for out in engine.generate(prompt, params):
        tokens += out.token_ids
        cached = out.num_cached_tokens
    return tokens, cached


async def at_rest(engine: AsyncEngine) -> None:
    """Nothing is held once everybody is served."""
    await asyncio.sleep(0.3)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.blocks_used) == (0, 0, 0)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("chunk", [512, 32])
def test_alone_cold_then_warm(
    checkpoint: tuple[Path, list[list[int]], list[list[int]]], overlap: int, chunk: int
) -> None:
    folder, asked, expected = checkpoint

    async def run() -> None:
        async with AsyncEngine(
            config(folder, overlap=overlap, max_num_batched_tokens=chunk, max_num_seqs=8), in_process=True
        ) as engine:
            for turn in ("cold", "warm"):
                for prompt, tokens in zip(asked, expected, strict=True):
                    got, cached = await one(engine, prompt)
                    assert got == tokens, f"{turn}, {len(prompt)} tokens"
                    if turn == "warm":
                        assert cached == (len(prompt) - 1) // BLOCK * BLOCK
            await at_rest(engine)

    asyncio.run(run())


@pytest.mark.parametrize("chunk", [33, 64, 107])
@pytest.mark.parametrize("overlap", [0, 1])
def test_batched_and_chunked_at_odd_sizes(
    checkpoint: tuple[Path, list[list[int]], list[list[int]]], chunk: int, overlap: int
) -> None:
    folder, asked, expected = checkpoint

    async def run() -> None:
        async with AsyncEngine(
            config(folder, overlap=overlap, max_num_batched_tokens=chunk), in_process=True
        ) as engine:
            got = await asyncio.gather(*(one(engine, prompt) for prompt in asked))
            assert [tokens for tokens, _ in got] == expected
            await at_rest(engine)

    asyncio.run(run())


@pytest.mark.parametrize("overlap", [0, 1])
def test_preempted_and_computed_again(checkpoint: tuple[Path, list[list[int]], list[list[int]]], overlap: int) -> None:
    folder, asked, expected = checkpoint

    async def run() -> None:
        # Room for about two of the long requests: the rest take turns.
        tight = config(folder, overlap=overlap, kv_cache_bytes=48 * BLOCK * BYTES_PER_TOKEN)
        async with AsyncEngine(tight, in_process=True) as engine:
            assert engine.facts.num_blocks == 48
            got = await asyncio.gather(*(one(engine, prompt) for prompt in asked))
            assert [tokens for tokens, _ in got] == expected
            assert engine.stats().num_preemptions > 0
            await at_rest(engine)

    asyncio.run(run())


@pytest.mark.parametrize("chunk", [1, 7, 512])
@pytest.mark.parametrize(("block", "num_blocks", "num_tokens"), [(16, 5, 40), (64, 3, 40), (256, 3, 100)])
def test_every_size_of_block_and_chunk_gives_the_same_tokens(
    tmp_path: Path, block: int, num_blocks: int, num_tokens: int, chunk: int
) -> None:
    """Several requests cross a block border at once and the pool is one block short: somebody must give way."""
    reference = toy_llama(tmp_path, seed=3)
    draw = random.Random(block)
    asked = [[draw.randrange(3, VOCAB_SIZE) for _ in range(block - short)] for short in (3, 5, 4)]
    expected = [greedy(reference, prompt, num_tokens) for prompt in asked]
    tight = config(
        tmp_path,
        block_size=block,
        max_num_batched_tokens=chunk,
        max_num_seqs=min(chunk, 8),
        session_admission=False,
        kv_cache_bytes=num_blocks * block * BYTES_PER_TOKEN,
    )

    async def run() -> None:
        async with AsyncEngine(tight, in_process=True) as engine:
            assert engine.facts.num_blocks == num_blocks
            got = await asyncio.gather(*(one(engine, prompt, num_tokens) for prompt in asked))
            assert [tokens for tokens, _ in got] == expected
            # With one token a step there is one request at a time, and nobody to give way.
            assert chunk == 1 or engine.stats().num_preemptions > 0
            await at_rest(engine)

    asyncio.run(run())


def test_without_prefix_caching(checkpoint: tuple[Path, list[list[int]], list[list[int]]]) -> None:
    folder, asked, expected = checkpoint

    async def run() -> None:
        async with AsyncEngine(config(folder, enable_prefix_caching=False), in_process=True) as engine:
            for _ in range(2):
                got = await asyncio.gather(*(one(engine, prompt) for prompt in asked))
                assert got == [(tokens, 0) for tokens in expected]

    asyncio.run(run())


def test_in_an_engine_process(checkpoint: tuple[Path, list[list[int]], list[list[int]]]) -> None:
    folder, asked, expected = checkpoint

    async def run() -> None:
        async with AsyncEngine(config(folder)) as engine:
            got = await asyncio.gather(*(one(engine, prompt) for prompt in asked))
            assert [tokens for tokens, _ in got] == expected

    asyncio.run(run())


def test_bfloat16_answers_too(checkpoint: tuple[Path, list[list[int]], list[list[int]]]) -> None:
    folder, asked, expected = checkpoint

    async def run() -> None:
        async with AsyncEngine(config(folder, dtype="bfloat16"), in_process=True) as engine:
            got = await asyncio.gather(*(one(engine, prompt) for prompt in asked))
            first = sum(tokens[0] == wanted[0] for (tokens, _), wanted in zip(got, expected, strict=True))
            assert first >= 0.8 * NUM_PROMPTS

    asyncio.run(run())
