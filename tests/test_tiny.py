"""A toy model through the whole engine, on a CPU, in seconds. If this fails, nothing else matters."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.toy import greedy, toy_llama
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams

PROMPTS = [[5, 9, 300, 41], list(range(100, 170)), [7] * 33]
NUM_TOKENS = 24


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_prompt_goes_in_and_the_tokens_of_transformers_come_out(tmp_path: Path, overlap: int) -> None:
    reference = toy_llama(tmp_path)
    expected = [greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]
    config = EngineConfig(
        model=str(tmp_path), dtype="float32", block_size=16, max_num_batched_tokens=64, overlap=overlap, num_threads=1
    )

    async def run() -> list[list[int]]:
        async with AsyncEngine(config, in_process=True) as engine:

            async def one(prompt: list[int]) -> list[int]:
                params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
                return [token async for out in engine.generate(prompt, params) for token in out.token_ids]

            together = await asyncio.gather(*map(one, PROMPTS))
            stats = engine.stats()
            assert stats.running == stats.waiting == stats.blocks_used == 0
            return list(together)

    assert asyncio.run(run()) == expected
