"""An engine of four ranks answers like one: with experts over gloo, and where there are four GPUs a dense model there,
in float32, which no kernel of a GPU takes for experts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from tests.engine.test_ranks import BLOCK, NUM_TOKENS, PROMPTS, SIZES, tokens
from tests.models.families import write
from tests.toy import greedy, toy_llama
from tokenspeed import AsyncEngine, EngineConfig
from tokenspeed.config import Parallel

GPUS = torch.cuda.device_count() >= 4
LAYOUTS = {
    "attention and experts cut": Parallel(world=4),
    "own tokens, experts dealt": Parallel(world=4, attn_dp=4, moe_ep=4),
    "own tokens, dense layers cut": Parallel(world=4, attn_dp=4, dense_tp=4),
}
HERE = ["attention and experts cut", "own tokens, dense layers cut"] if GPUS else ["own tokens, experts dealt"]
"""On a CPU the one that has most to it; `tests/models/test_over_ranks.py` has the others."""


@pytest.mark.parametrize("layout", HERE)
def test_four_ranks_answer_like_one(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSPEED_DEBUG", "1")  # plans and tokens are compared between ranks
    if not GPUS:
        monkeypatch.setenv("TOKENSPEED_DEVICE", "cpu")
    reference = toy_llama(tmp_path) if GPUS else write(tmp_path, "deepseek-v3", seed=3)
    config = EngineConfig(
        model=str(tmp_path), dtype="float32", block_size=BLOCK, num_threads=1, parallel=LAYOUTS[layout], **SIZES
    )

    async def run() -> list[list[int]]:
        async with AsyncEngine(config, in_process=True) as engine:
            alone = await tokens(engine, PROMPTS[0])  # three groups without rows, where there are groups
            together = await asyncio.gather(*(tokens(engine, prompt) for prompt in [*PROMPTS, PROMPTS[1]]))
            return [alone, *together]

    wanted = [greedy(reference, prompt, NUM_TOKENS) for prompt in PROMPTS]
    assert asyncio.run(run()) == [wanted[0], *wanted, wanted[1]]
