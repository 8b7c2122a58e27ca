"""A second turn finds the first in the prefix cache, whatever tokens the model chose for its text."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.toy import toy_llama
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams
from tokenspeed.request import RequestOutput
from tokenspeed.text.spans import Span

BLOCK = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    toy_llama(path)
    return path


async def answer(engine: AsyncEngine, prompt: list[Span], salt: str) -> list[RequestOutput]:
    """80 random tokens of plain text."""
    texts = {token_id: engine.tokenizer.token_bytes(token_id) for token_id in range(engine.facts.vocab_size)}
    plain = tuple(token_id for token_id, text in texts.items() if text.isascii() and not text.startswith(b"<|"))
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=80, allowed_token_ids=plain)
    return [output async for output in engine.generate(prompt, params, cache_salt=salt)]


def test_a_second_turn_computes_only_what_is_new(folder: Path) -> None:
    async def run() -> None:
        config = EngineConfig(model=str(folder), dtype="float32", block_size=BLOCK, num_threads=1)
        async with AsyncEngine(config, in_process=True) as engine:
            assert engine.template is not None
            chat = [{"role": "user", "content": "Tell me a story."}]
            first = await answer(engine, engine.template.render(chat), "a")
            said = "".join(output.text for output in first)
            generated = [token_id for output in first for token_id in output.token_ids]
            assert engine.tokenizer.encode(said) != generated
            chat += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
            prompt = engine.template.render(chat)
            second = (await answer(engine, prompt, "a"))[-1]
            assert second.num_cached_tokens >= first[-1].num_prompt_tokens + len(generated) - BLOCK
            other = (await answer(engine, prompt, "b"))[-1]
            assert other.num_cached_tokens == 0
            assert other.num_prompt_tokens == len(engine.tokenizer.encode_spans(prompt))
            assert engine.memory_stats().tokens_generated >= len(generated)

    asyncio.run(run())


def test_what_was_generated_before_an_abort_is_found_too(folder: Path) -> None:
    async def run() -> None:
        config = EngineConfig(model=str(folder), dtype="float32", block_size=BLOCK, num_threads=1)
        async with AsyncEngine(config, in_process=True) as engine:
            assert engine.template is not None
            chat = [{"role": "user", "content": "Tell me a story."}]
            params = SamplingParams(temperature=0.0, max_tokens=500, allowed_token_ids=tuple(range(70, 90)))
            stream = await engine.submit(engine.template.render(chat), params)
            outputs = [await anext(stream) for _ in range(40)]
            await stream.aclose()
            said = "".join(output.text for output in outputs)
            chat += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on."}]
            await answer(engine, engine.template.render(chat), "")
            assert engine.memory_stats().tokens_generated >= 40

    asyncio.run(run())
