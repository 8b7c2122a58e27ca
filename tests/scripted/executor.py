"""The device plane of a scripted model: each step's tokens are the next ones of the script's answer.

Everything else is the real engine: control plane, step loop, prefix cache, streams.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.scripted.checkpoint import BEGIN, CONTEXT, END, SCRIPT
from tests.scripted.script import Reply, Script, Turn
from tokenspeed.batch import BatchLimits, Int32Array, Plan, PlanBuffers, StepResult, StepTimes
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.config import EngineConfig
from tokenspeed.executor.interface import Binding, Flight, Mask
from tokenspeed.executor.load import LoadedExecutor, Progress
from tokenspeed.text.load import TextSide, load_text

log = logging.getLogger(__name__)

STEP_SECONDS = 0.001
STEP_TOKENS = 8192
NUM_BLOCKS = 4 * CONTEXT // 64


class ScriptedModel:
    """Knows the answer to a prompt of token ids."""

    def __init__(self, script: Script, text: TextSide) -> None:
        assert text.template is not None
        self._script = script
        self._tokenizer = text.tokenizer
        self._template = text.template
        self._begin = text.tokenizer.control[BEGIN]

    def answer(self, prompt: Sequence[int]) -> list[int]:
        """What it writes, its end included."""
        turns = self._turns(prompt)
        where, reply = self._script.reply(turns)
        calls = ", ".join(call.name for call in reply.calls) or "none"
        log.info("%s, %s: %d tokens, %d messages; calls: %s", self._script.name, where, len(prompt), len(turns), calls)
        num_calls = sum(turn.text.count("<|tool_call_begin|>") for turn in turns if turn.role == "assistant")
        return self._tokenizer.encode(self._written(reply, num_calls) + END, parse_special=True)

    def _turns(self, prompt: Sequence[int]) -> list[Turn]:
        turns: list[list[int]] = [[]]
        for token_id in prompt:
            if token_id == self._begin:
                turns.append([])
            turns[-1].append(token_id)
        texts = [self._tokenizer.decode(ids, skip_special_tokens=False) for ids in turns[1:]]
        return [Turn(*text[len(BEGIN) :].removesuffix(f"{END}\n").partition("\n")[::2]) for text in texts]

    def _written(self, reply: Reply, num_calls: int) -> str:
        """As the chat template writes it in the next turn's history, so that this finds it in the cache."""
        message: dict[str, object] = {"role": "assistant", "content": reply.text, "reasoning_content": reply.thinking}
        if reply.calls:
            message["tool_calls"] = [
                {
                    "id": f"functions.{call.name}:{num_calls + index}",  # Kimi's; it counts over a conversation
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(reply.calls)
            ]
        chat: list[dict[str, object]] = [{"role": "user", "content": ""}, message]
        text = "".join(span.text for span in self._template.render(chat, add_generation_prompt=False))
        return text.partition(f"{BEGIN}assistant\n")[2].rpartition(END)[0]


@dataclass(frozen=True, slots=True)
class _Answering:
    """What a slot is saying. `masked`: a grammar must allow each token of it."""

    prompt_len: int
    answer: list[int]
    masked: bool


class ScriptedExecutor:
    """Plays answers. It keeps no cache: what a step computes is known beforehand."""

    num_blocks = NUM_BLOCKS

    def __init__(self, model: ScriptedModel, limits: BatchLimits) -> None:
        self._model = model
        self._limits = limits
        self._slots: dict[int, _Answering] = {}

    def launch(self, plan: Plan, bindings: Sequence[Binding]) -> Flight:
        for slot, index in plan.bound.tolist():
            binding = bindings[index]
            answer = self._model.answer(binding.tokens[: binding.prompt_len].tolist())
            self._slots[slot] = _Answering(binding.prompt_len, answer, binding.masked)
        said: list[int] = []
        masked: dict[int, int] = {}
        for row in plan.sample_rows.tolist():
            slot = int(plan.row_slot[row])
            answering = self._slots[slot]
            # The token behind the row's last one; after the answer its end again.
            index = int(plan.row_computed[row] + plan.row_new[row]) - answering.prompt_len
            said.append(answering.answer[min(index, len(answering.answer) - 1)])
            if answering.masked:
                masked[slot] = said[-1]
        return _Flight(plan.step, np.array(said, dtype=np.int32).reshape(-1, 1), masked)

    def new_buffers(self) -> PlanBuffers:
        return PlanBuffers(self._limits)

    def close(self) -> None:
        return None


class _Flight:
    def __init__(self, step: int, said: Int32Array, masked: dict[int, int]) -> None:
        self._step = step
        self._said = said
        self._masked = masked
        self.masked: Sequence[int] = list(masked)

    def mask(self, masks: Sequence[Mask]) -> None:
        for token, mask in zip(self._masked.values(), masks, strict=True):
            if mask is not None and not int(mask[token >> 5]) >> (token & 31) & 1:
                raise ValueError(f"the script says token {token}, which the request's grammar forbids")

    async def tokens(self) -> StepResult:
        began = time.perf_counter()
        await asyncio.sleep(STEP_SECONDS)
        times = StepTimes(time.perf_counter() - began, 0.0)
        return StepResult(self._step, self._said, np.ones(len(self._said), dtype=np.int32), None, {}, times)


def load_scripted(config: EngineConfig, progress: Progress | None = None) -> LoadedExecutor:
    """As `load_executor`, for a folder of `write_checkpoint`; there is nothing to read whose progress could be told."""
    assert config.model is not None
    source = resolve(config.model, "dummy")
    model_config = read_model_config(source)
    limits = BatchLimits(
        max_rows=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens or STEP_TOKENS,
        max_blocks=-(-CONTEXT // config.block_size),
        block_size=config.block_size,
    )
    model = ScriptedModel(Script.read(Path(config.model) / SCRIPT), load_text(source))
    executor = ScriptedExecutor(model, limits)
    summary = f"a scripted model; context {CONTEXT}"
    pools, vocab, eos = (executor.num_blocks,), model_config.vocab_size, model_config.eos_token_ids
    return LoadedExecutor(executor, pools, limits, CONTEXT, vocab, eos, summary)
