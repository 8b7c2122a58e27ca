"""The embedded model answers 20 real prompts with the tokens of `transformers`, however it is served.

float32, greedy. The weights are read from the GGUF file by `tokenspeed.checkpoint`, whose tensors
`tests/checkpoint` holds to those that `transformers` reads from the same file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.toy import greedy
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import iterate_weights
from tokenspeed.text.load import load_text

NUM_TOKENS = 24
SYSTEM = "You are a careful programmer. Answer briefly, and show code where it helps the reader. " * 8
QUESTIONS = [
    "What is the capital of France?",
    "Write a Python function that reverses a linked list.",
    "Explain what a mutex is.",
    "How do I list files by size in a shell?",
    "Translate to German: the train is late.",
    "What does SQL's GROUP BY do?",
    "Name three prime numbers above 100.",
    "Why is the sky blue?",
    "Write a haiku about autumn.",
    "What is 17 times 23?",
    "Give me a regular expression for an e-mail address.",
    "Who wrote Hamlet?",
    "Explain recursion to a child.",
    "What is the difference between TCP and UDP?",
    "Write a unit test for a stack.",
    "How does a hash table resolve collisions?",
    "List the planets.",
    "What is a closure in JavaScript?",
    "Summarise the plot of Faust in a sentence.",
    "How do I undo the last git commit?",
]


def prompts() -> list[list[int]]:
    """Chats, every second one behind a long system prompt that they share."""
    text = load_text(resolve(None, "auto"), tokenizer=None, chat_template=None)
    assert text.template is not None
    encoded = []
    for index, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        if index % 2:
            messages.insert(0, {"role": "system", "content": SYSTEM})
        encoded.append(text.tokenizer.encode_spans(text.template.render(messages, add_generation_prompt=True)))
    return encoded


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    source = resolve(None, "auto")
    settings = {key: value for key, value in read_model_config(source).hf.items() if key != "architectures"}
    reference = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    state = reference.state_dict()
    with torch.no_grad():
        for name, tensor in iterate_weights(source):
            state[name].copy_(tensor)
    return [greedy(reference, prompt, NUM_TOKENS) for prompt in prompts()]


def configs() -> Iterator[tuple[str, EngineConfig, bool]]:
    """A name, an engine, and whether all prompts are asked at once."""
    base = {"dtype": "float32", "kv_cache_bytes": 1 << 30}
    yield "cold, then warm", EngineConfig(**base, overlap=1), False
    yield "not overlapped", EngineConfig(**base, overlap=0), False
    yield "batched", EngineConfig(**base), True
    yield "chunks of 37 tokens", EngineConfig(**base, max_num_batched_tokens=37, max_num_seqs=16), True
    # Room for about three of the long prompts in blocks of 16 tokens, 46,080 bytes a token.
    yield "preempted", EngineConfig(dtype="float32", block_size=16, kv_cache_bytes=40 * 16 * 46080), True


@pytest.mark.parametrize(("name", "config", "together"), list(configs()), ids=lambda value: str(value)[:24])
def test_the_tokens_are_those_of_transformers(
    expected: list[list[int]], name: str, config: EngineConfig, together: bool
) -> None:
    asked = prompts()

    async def one(engine: AsyncEngine, prompt: list[int]) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        return [token async for out in engine.generate(prompt, params) for token in out.token_ids]

    async def run() -> None:
        async with AsyncEngine(config, in_process=True) as engine:
            for _ in range(2 if name == "cold, then warm" else 1):
                if together:
                    got = list(await asyncio.gather(*(one(engine, prompt) for prompt in asked)))
                else:
                    got = [await one(engine, prompt) for prompt in asked]
                assert got == expected
            stats = engine.stats()
            assert (stats.num_preemptions > 0) == (name == "preempted")
            assert stats.cached_tokens > 0

    asyncio.run(run())
