"""Every family gives the greedy tokens of `transformers` through the engine, under every condition of serving."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.models.families import FAMILIES, write
from tests.toy import VOCAB_SIZE, greedy
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.registry import build_model

NAMES = [*FAMILIES, "kimi-k2.5"]
BLOCK = 16
NUM_TOKENS = 32
BLOCKS_WHEN_TIGHT = 16
"""Two prompts of 5 and 8 blocks fit, with a block each to grow into; they end with 17."""
PARAMS = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@dataclass(frozen=True)
class Case:
    """A checkpoint, prompts, what `transformers` says to each, and the bytes of one KV block."""

    folder: Path
    prompts: list[list[int]]
    expected: list[list[int]]
    block_bytes: int


def prompts() -> list[list[int]]:
    """Over three blocks each, around block borders, two with a long prefix in common."""
    draw = random.Random(7)
    shared = [draw.randrange(3, VOCAB_SIZE) for _ in range(4 * BLOCK + 3)]
    alone = [[draw.randrange(3, VOCAB_SIZE) for _ in range(n)] for n in (5 * BLOCK, 117)]
    return [*alone, [*shared, 5], [*shared, 9, 7, 11, 400, 23]]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    reference = write(folder, request.param, seed=3)
    asked = prompts()
    expected = [greedy(reference, prompt, NUM_TOKENS) for prompt in asked]
    assert all(len(set(tokens)) >= 20 for tokens in expected), "a model that repeats itself proves nothing"
    ctx = BuildContext.of(device=torch.device("meta"), dtype=torch.float32, max_positions=256, block_size=BLOCK)
    spec = build_model(read_model_config(resolve(str(folder))), ctx).kv_spec
    return Case(folder, asked, expected, sum(layer.elements() for layer in spec) * BLOCK * 4)


def engine(case: Case, **changes: object) -> AsyncEngine:
    settings: dict[str, object] = {
        "model": str(case.folder),
        "dtype": "float32",
        "block_size": BLOCK,
        "max_model_len": 256,
        "max_num_batched_tokens": 512,
        "max_num_seqs": 8,
        "num_threads": 1,
        "kv_cache_bytes": 200 * case.block_bytes,
    }
    return AsyncEngine(EngineConfig(**(settings | changes)), in_process=True)  # type: ignore[arg-type]


async def one(running: AsyncEngine, prompt: list[int]) -> tuple[list[int], int]:
    """The tokens of one request, and how many prompt tokens came from the cache."""
    tokens: list[int] = []
    cached = 0
    async for out in running.generate(prompt, PARAMS):
        tokens += out.token_ids
        cached = out.num_cached_tokens
    return tokens, cached


def test_alone_cold_then_warm(case: Case) -> None:
    async def run() -> None:
        async with engine(case) as running:
            for turn in ("cold", "warm"):
                for prompt, expected in zip(case.prompts[:3], case.expected[:3], strict=True):
                    tokens, cached = await one(running, prompt)
                    assert tokens == expected, f"{turn}, {len(prompt)} tokens"
                    if turn == "warm":
                        assert cached == (len(prompt) - 1) // BLOCK * BLOCK

    asyncio.run(run())


def test_batched_and_in_chunks(case: Case) -> None:
    async def run() -> None:
        async with engine(case, max_num_batched_tokens=37) as running:
            got = await asyncio.gather(*(one(running, prompt) for prompt in case.prompts))
            assert [tokens for tokens, _ in got] == case.expected

    asyncio.run(run())


def test_preempted_and_computed_again(case: Case) -> None:
    async def run() -> None:
        async with engine(case, kv_cache_bytes=BLOCKS_WHEN_TIGHT * case.block_bytes) as running:
            assert running.facts.num_blocks == BLOCKS_WHEN_TIGHT
            got = await asyncio.gather(*(one(running, prompt) for prompt in case.prompts[:2]))
            assert [tokens for tokens, _ in got] == case.expected[:2]
            assert running.stats().num_preemptions > 0

    asyncio.run(run())
