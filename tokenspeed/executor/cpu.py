"""The device plane on a CPU: one worker thread runs the launched steps in order.

The thread computes inside torch, which holds no interpreter lock meanwhile, so the step loop plans,
commits and publishes while a step runs. Per-slot state (last token, length, block table, sampling
state) belongs to that thread alone: what a step samples is what the next one reads.
"""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from tokenspeed.batch import (
    ON_DEVICE,
    BatchLimits,
    Int32Array,
    Int64Array,
    Logprobs,
    Plan,
    PlanBuffers,
    StepResult,
    StepTimes,
)
from tokenspeed.errors import InvariantBroken
from tokenspeed.executor import logprobs
from tokenspeed.executor.device_step import Model
from tokenspeed.executor.interface import Beside, Binding, Flight, Mask, Peers
from tokenspeed.executor.joint import told_by_all
from tokenspeed.executor.masks import AwaitedMasks, MaskedSlots, checked
from tokenspeed.executor.prompt_scores import PromptScores
from tokenspeed.executor.sampler import Sampled, Sampler
from tokenspeed.executor.sampling_tables import SamplingTables
from tokenspeed.layers.forward import ForwardInput, LayerKV

UNMAPPED = -1
"""An entry of a block table that no plan has filled."""


class CpuFlight:
    """A step on its way through the worker thread."""

    __slots__ = ("_landed", "_masks", "masked")

    def __init__(self, landed: Future[StepResult], masked: Sequence[int], masks: AwaitedMasks | None) -> None:
        self._landed = landed
        self.masked = masked
        self._masks = masks

    def mask(self, masks: Sequence[Mask]) -> None:
        if self._masks is not None:
            self._masks.give(checked(self.masked, masks))

    async def tokens(self) -> StepResult:
        """Wait for the step. Cancelling the wait does not cancel the step."""
        return await asyncio.wrap_future(self._landed)


class CpuExecutor:
    """Runs plans against `model` with `num_blocks` KV blocks of `limits.block_size` tokens of `dtype`.

    `num_threads` is the number of threads torch computes with, in this whole process. The KV cache is
    zero pages of the system until it is written, and never holds what another program left behind. With `peers` the
    model is one rank's, and all ranks have the same tokens; `launch` is told what lies `beside` the rows of its group.
    """

    def __init__(
        self,
        model: Model,
        *,
        num_blocks: int,
        limits: BatchLimits,
        vocab_size: int,
        dtype: torch.dtype,
        num_threads: int,
        peers: Peers | None = None,
    ) -> None:
        self._num_blocks = num_blocks
        self._limits = limits
        self._device = _Device(model, num_blocks, limits, vocab_size, dtype, peers)
        self._num_threads = num_threads
        self._queue: queue.SimpleQueue[_Launch | None] = queue.SimpleQueue()
        self._masked = MaskedSlots()
        self._awaited: AwaitedMasks | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="tokenspeed-cpu-executor", daemon=True)
        self._thread.start()

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    def launch(self, plan: Plan, bindings: Sequence[Binding], beside: Beside | None = None) -> Flight:
        """Queue one step; its tokens are those of all groups. Raises `InvariantBroken` after `close`."""
        if self._closed:
            raise InvariantBroken("a step was launched on a closed executor")
        landed: Future[StepResult] = Future()
        landed.set_running_or_notify_cancel()
        masked = self._masked.launched(plan, bindings)
        masks = self._awaited = AwaitedMasks() if masked else None
        self._queue.put(_Launch(plan, bindings, beside or Beside.alone(plan), landed, masks))
        return CpuFlight(landed, masked, masks)

    def new_buffers(self) -> PlanBuffers:
        return PlanBuffers(self._limits)

    def close(self) -> None:
        """Run what is queued, then end the thread."""
        if not self._closed:
            self._closed = True
            if self._awaited is not None:
                self._awaited.abandon()
            self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(self._num_threads)
        failure: BaseException | None = None
        while (launch := self._queue.get()) is not None:
            if failure is None:
                # Whatever a step raises belongs to whoever awaits its flight, and to every flight after it.
                try:
                    result = self._device.run(launch.plan, launch.bindings, launch.beside, launch.masks)
                except BaseException as error:
                    failure = error
                else:
                    launch.landed.set_result(result)
                    continue
            launch.landed.set_exception(failure)


@dataclass(frozen=True, slots=True)
class _Launch:
    plan: Plan
    bindings: Sequence[Binding]
    beside: Beside
    landed: Future[StepResult]
    masks: AwaitedMasks | None


class _Device:
    """Per-slot state and the cache. On a CPU numpy arrays are the device's memory."""

    def __init__(
        self,
        model: Model,
        num_blocks: int,
        limits: BatchLimits,
        vocab_size: int,
        dtype: torch.dtype,
        peers: Peers | None,
    ) -> None:
        self._model = model
        self._num_blocks = num_blocks
        self._block_size = limits.block_size
        self._vocab_size = vocab_size
        self._kv: list[LayerKV] = [
            tuple(lazy_zeros((num_blocks, limits.block_size, *shape), dtype) for _, shape in spec.tensors)
            for spec in model.kv_spec
        ]
        self._tables = SamplingTables(limits.max_rows, vocab_size)
        self._sampler = Sampler(self._tables)
        self._peers = peers
        self._last_token: Int64Array = np.zeros(limits.max_rows, dtype=np.int64)
        self._length: Int64Array = np.zeros(limits.max_rows, dtype=np.int64)
        self._counted: Int64Array = np.arange(limits.max_rows + 1)
        self._block_table: Int32Array = np.full((limits.max_rows, limits.max_blocks), UNMAPPED, dtype=np.int32)
        self._prompt_scores: dict[int, PromptScores] = {}

    @torch.inference_mode()
    def run(
        self, plan: Plan, bindings: Sequence[Binding], beside: Beside, masks: AwaitedMasks | None
    ) -> StepResult:
        start = time.perf_counter()
        self._update_slots(plan, bindings)
        if not beside.rows:
            return _result(plan, StepTimes(time.perf_counter() - start, 0.0))
        slots = plan.row_slot.astype(np.int64)
        hidden = self._model.forward(self._inputs(plan, slots, beside), self._kv)
        sample_rows = plan.sample_rows
        logits = self._model.logits(_sampled_rows(plan, hidden)) if plan.num_samples else None
        computed = time.perf_counter()
        scores = self._score_prompts(plan, slots, hidden)
        self._length[slots] += plan.row_new
        given = () if masks is None else masks.wait()
        sampled = self._sample(logits, slots[sample_rows], given, beside) if any(beside.samples) else None
        result = _result(plan, StepTimes(computed - start, time.perf_counter() - computed), sampled, scores)
        return result if self._peers is None or not beside.tells else told_by_all(result, beside, self._peers)

    def _update_slots(self, plan: Plan, bindings: Sequence[Binding]) -> None:
        """Releases, then bindings, then table deltas: a slot may change hands within one plan."""
        if plan.num_copies:
            raise InvariantBroken(f"step {plan.step} copies blocks of a second tier, which this executor does not have")
        if plan.num_released or plan.num_bound:
            released = plan.released.tolist()
            self._tables.release(released)
            for slot in released:
                self._prompt_scores.pop(slot, None)
            slots, at = plan.bound[:, 0].tolist(), plan.bound[:, 1].tolist()
            self._block_table[released + slots] = UNMAPPED
            self._length[slots] = UNMAPPED
            for slot, index in zip(slots, at, strict=True):
                self._tables.bind(slot, bindings[index])
                self._bind_prompt(slot, bindings[index])
        if plan.num_deltas:
            slot_at, position, block = plan.table_delta.T
            if not 0 <= block.min() <= block.max() < self._num_blocks:
                raise InvariantBroken(f"step {plan.step} names a block outside the {self._num_blocks} of the cache")
            self._block_table[slot_at, position] = block

    def _bind_prompt(self, slot: int, binding: Binding) -> None:
        self._prompt_scores.pop(slot, None)
        if (scores := PromptScores.of(binding)) is not None:
            self._prompt_scores[slot] = scores

    def _inputs(self, plan: Plan, slots: Int64Array, beside: Beside) -> ForwardInput:
        """The plan and the device's state as arguments of a forward pass; no rows where only other groups have any."""
        computed = self._length[slots]
        computed = np.where(computed == UNMAPPED, plan.row_computed, computed)
        if not np.array_equal(computed, plan.row_computed):
            raise InvariantBroken(f"step {plan.step} and the device disagree on how many tokens are computed")
        self._length[slots] = computed
        new = plan.row_new.astype(np.int64)
        start, row_of, positions = self._places(plan, new, computed)
        token_ids = plan.token_ids.astype(np.int64)
        on_device = token_ids == ON_DEVICE
        token_ids[on_device] = self._last_token[slots[row_of[on_device]]]
        kv_len = computed + new
        columns = -(-int(kv_len.max(initial=0)) // self._block_size)
        block_table = self._block_table[slots, :columns]
        block, offset = np.divmod(positions, self._block_size)
        blocks = block_table[row_of, block].astype(np.int64)
        if blocks.min(initial=0) < 0:
            raise InvariantBroken(f"step {plan.step} computes tokens that have no block")
        return ForwardInput(
            token_ids=torch.from_numpy(token_ids),
            positions=torch.from_numpy(positions),
            kv_slots=torch.from_numpy(blocks * self._block_size + offset),
            query_start=torch.from_numpy(start.astype(np.int32)),
            kv_len=torch.from_numpy(kv_len.astype(np.int32)),
            block_table=torch.from_numpy(block_table),
            num_decode=plan.num_decode,
            query_lens=tuple(new.tolist()),
            kv_lens=tuple(kv_len.tolist()),
            block_size=self._block_size,
            padded_tokens=beside.tokens,
        )

    def _places(self, plan: Plan, new: Int64Array, computed: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
        """Where each row's tokens begin [R+1], and each token's row and position [T]."""
        if plan.num_tokens == plan.num_rows:  # one each: a call of numpy takes 4 µs between steps, and 7 are spared
            return self._counted[: plan.num_rows + 1], self._counted[: plan.num_rows], computed
        start = np.zeros(plan.num_rows + 1, dtype=np.int64)
        np.cumsum(new, out=start[1:])
        row_of = np.repeat(np.arange(plan.num_rows), new)
        return start, row_of, np.arange(plan.num_tokens) - (start[:-1] - computed)[row_of]

    def _sample(
        self, logits: torch.Tensor | None, slots: Int64Array, masks: Sequence[Mask], beside: Beside
    ) -> Sampled:
        """A token for each sample of all groups; `logits` are None where this rank's has none."""
        sampled = Sampled(np.zeros(len(slots), dtype=np.int32), None)
        if logits is not None and (self._peers is None or self._peers.decides):
            sampled = self._sampler.sample(logits, slots, self._length[slots], masks)
        own, everyone = sampled.tokens, sampled.tokens
        if self._peers is not None:
            own, everyone = _shared(sampled.tokens, beside, self._peers)
        # A row without a token ends; the step already launched behind it reads a harmless id instead.
        self._last_token[slots] = np.maximum(own, 0)
        return Sampled(everyone, sampled.logprobs)

    def _score_prompts(self, plan: Plan, slots: Int64Array, hidden: torch.Tensor) -> dict[int, Logprobs]:
        """Each chunk's scores of the prompt tokens that follow its positions, for the rows that asked."""
        if not self._prompt_scores:
            return {}
        scores: dict[int, Logprobs] = {}
        starts = np.cumsum(plan.row_new) - plan.row_new
        for row, slot in enumerate(slots.tolist()):
            asked = self._prompt_scores.get(slot)
            if asked is None:
                continue
            targets = asked.targets(int(plan.row_computed[row]), int(plan.row_new[row]))
            if len(targets):
                at = int(starts[row])
                token_ids = torch.from_numpy(targets)
                scores[row] = logprobs.score(
                    self._model.logits, hidden[at : at + len(targets)], token_ids, self._vocab_size, asked.k
                )
        return scores


def _sampled_rows(plan: Plan, hidden: torch.Tensor) -> torch.Tensor:
    """The hidden states of the last token of each row that samples: of a step of decode rows, as they are."""
    if plan.num_samples == plan.num_tokens:
        return hidden
    return hidden[torch.from_numpy(np.cumsum(plan.row_new, dtype=np.int64)[plan.sample_rows] - 1)]


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that cost no memory until they are written: numpy's calloc leaves them unmapped, torch's does not."""
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def _shared(tokens: Int32Array, beside: Beside, peers: Peers) -> tuple[Int32Array, Int32Array]:
    """The tokens that were decided for the samples of this rank's group, and for those of all, group after group."""
    padded: Int32Array = np.zeros(max(beside.samples), dtype=np.int32)
    padded[: len(tokens)] = tokens
    everyone = peers.share(torch.from_numpy(padded)).numpy()
    parts = [row[:count] for row, count in zip(everyone, beside.samples, strict=True)]
    return padded[: len(tokens)], np.concatenate(parts)


def _result(
    plan: Plan, times: StepTimes, sampled: Sampled | None = None, scores: dict[int, Logprobs] | None = None
) -> StepResult:
    tokens = np.zeros(0, dtype=np.int32) if sampled is None else sampled.tokens
    return StepResult(
        step=plan.step,
        tokens=tokens[:, None],
        num_tokens=np.ones(len(tokens), dtype=np.int32),
        logprobs=None if sampled is None else sampled.logprobs,
        prompt_logprobs=scores or {},
        times=times,
    )
