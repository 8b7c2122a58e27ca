"""The device plane on a GPU: steps are enqueued on a stream, and a thread waits for them to land.

`launch` copies the plan to the device, replays graphs or enqueues the operations of a step, enqueues the copy
of the tokens back and returns; it never waits for the device. What a decode row reads (its last token, its
length, its blocks, how it samples) lies in device tables, so the next step can be launched at once. On a
device without streams the same operations run as they are enqueued: that is how tests run this on a CPU.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from tokenspeed.batch import BatchLimits, Int64Array, Plan, StepResult, StepTimes
from tokenspeed.errors import InvariantBroken
from tokenspeed.executor.device_step import DeviceStep, Model, StepOps
from tokenspeed.executor.graphs import Graphs, buckets
from tokenspeed.executor.interface import Beside, Binding, Flight, Mask, Peers
from tokenspeed.executor.joint import told_by_all
from tokenspeed.executor.logprobs import DeviceLogprobs, joined, pick_on_device, score_on_device, spread
from tokenspeed.executor.masks import MaskedSlots, checked
from tokenspeed.executor.prompt_scores import PromptScores
from tokenspeed.executor.sampling_tables import Feature
from tokenspeed.executor.slot_tables import UNMAPPED, SlotTables, uploaded
from tokenspeed.executor.staging import DevicePlan, Staging
from tokenspeed.executor.warm_steps import warm_steps
from tokenspeed.kernels.slot_state import DISAGREES, NO_BLOCK
from tokenspeed.layers.forward import LayerKV

FAULTS = {
    DISAGREES: "the plan and the device disagree on how many tokens are computed",
    NO_BLOCK: "it computes tokens that have no block",
}


class GpuFlight:
    """A step on its way through the device. `sample` enqueues the rest of it where that waits for masks."""

    __slots__ = ("_landed", "_sample", "masked")

    def __init__(
        self, landed: Future[StepResult], masked: Sequence[int], sample: Callable[[Sequence[Mask]], None]
    ) -> None:
        self._landed = landed
        self._sample = sample
        self.masked = masked

    def mask(self, masks: Sequence[Mask]) -> None:
        if self.masked:
            self._sample(checked(self.masked, masks))

    async def tokens(self) -> StepResult:
        """Wait for the step. Cancelling the wait does not cancel the step."""
        return await asyncio.wrap_future(self._landed)


class GpuExecutor:
    """Runs plans against `model` with the KV cache `kv`, all on `target`'s device.

    `capture` must be called before the first step if steps are to be graphs. With `peers` the model is one
    rank's; all ranks warm up, capture and launch in the same order, and `launch` is told what lies `beside` the rows of
    this rank's group.
    """

    def __init__(
        self,
        model: Model,
        kv: Sequence[LayerKV],
        *,
        limits: BatchLimits,
        vocab_size: int,
        step_ops: StepOps,
        device: torch.device,
        peers: Peers | None = None,
    ) -> None:
        self._model = model
        self._kv = kv
        self._num_blocks = len(kv[0][0])
        self._limits = limits
        self._device = device
        self._vocab_size = vocab_size
        self._peers = peers
        self._tables = SlotTables(limits, vocab_size, device)
        self._plan = DevicePlan(self.new_buffers(), device)
        self._step = DeviceStep(model, kv, self._plan, self._tables, limits, step_ops, peers)
        self._graphs = Graphs(buckets(limits.max_rows), self._step.decode, self._step.head)
        self._prompt_scores: dict[int, PromptScores] = {}
        self._masked = MaskedSlots()
        self._waiting: Future[StepResult] | None = None
        self._closed = False
        self._queue: queue.SimpleQueue[tuple[_Landing | BaseException, Future[StepResult]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._land, name="tokenspeed-gpu-executor", daemon=True)
        self._thread.start()

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_graphs(self) -> int:
        """How many `capture` has made."""
        pieces = self._step.pieces
        return len(self._graphs) + (0 if pieces is None else len(pieces))

    def new_buffers(self) -> Staging:
        groups = 1 if self._peers is None else self._peers.num_groups
        return Staging(self._limits, self._vocab_size, self._device, groups)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run steps with prompts of many sizes on padding, for what compiles, loads or takes memory on first use."""
        padding, plan = self._tables.padding, self._plan
        self._tables.block_table[padding] = 0
        for cache in itertools.chain.from_iterable(self._kv):
            cache[0].zero_()  # the context of these steps, in which nothing was stored
        if self._step.pieces is not None:
            self._step.pieces.prepare()
        for step in warm_steps(self._limits):
            self._clear_plan()
            rows = len(step.query_lens)
            plan.row_new[:rows] = torch.tensor(step.query_lens, dtype=torch.int32)
            plan.row_computed[:rows] = step.context
            self._tables.state.length[padding] = step.context
            self._step.prefill(step.num_decode, step.query_lens, step.kv_lens, self._limits.max_rows)
            self._step.head(self._limits.max_rows)
        self._tables.state.length[padding] = 0
        self._tables.block_table[padding] = UNMAPPED
        self._clear_plan()

    @torch.inference_mode()
    def capture(self) -> float:
        """Make graphs of decode steps, one pair a bucket, and of what lies between attentions in steps with prompts.
        Seconds that it took."""
        start = time.perf_counter()
        self._clear_plan()
        self._graphs.capture()
        if self._step.pieces is not None:
            self._step.pieces.capture()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def launch(self, plan: Plan, bindings: Sequence[Binding], beside: Beside | None = None) -> Flight:
        """Enqueue one step, up to its samples if these wait for masks; its tokens are those of all groups. Raises
        `InvariantBroken` after `close`, and where a step still waits."""
        if self._closed or self._waiting is not None:
            raise InvariantBroken("a step was launched on an executor that is closed, or waits for masks")
        landed: Future[StepResult] = Future()
        landed.set_running_or_notify_cancel()
        masked = self._masked.launched(plan, bindings)
        # What enqueueing raises belongs to whoever awaits the flight, and to every flight after it.
        try:
            launched = self._enqueue(plan, bindings, beside or Beside.alone(plan))
        except BaseException as error:
            self._queue.put((error, landed))
            return GpuFlight(landed, (), lambda _: None)

        def sample(masks: Sequence[Mask]) -> None:
            self._waiting = None
            try:
                self._enqueue_samples(launched, masked, masks)
            except BaseException as error:
                self._queue.put((error, landed))
            else:
                self._queue.put((launched, landed))

        self._waiting = landed
        if not masked:
            sample(())
        return GpuFlight(landed, masked, sample)

    def close(self) -> None:
        """Wait for what was launched, then end the thread and forget the graphs."""
        if not self._closed:
            self._closed = True
            if self._waiting is not None:
                error = InvariantBroken("the executor was closed while a step waited for masks")
                self._queue.put((error, self._waiting))
            self._queue.put(None)
        self._thread.join()
        self._graphs.release()
        if self._step.pieces is not None:
            self._step.pieces.release()

    def _land(self) -> None:
        failure: BaseException | None = None
        while (item := self._queue.get()) is not None:
            launched, landed = item
            if failure is None:
                try:
                    if isinstance(launched, BaseException):
                        raise launched
                    result = launched.result()
                except BaseException as error:
                    failure = error
                else:
                    landed.set_result(result)
                    continue
            landed.set_exception(failure)

    @torch.inference_mode()
    def _enqueue(self, plan: Plan, bindings: Sequence[Binding], beside: Beside) -> _Landing:
        staging = plan.buffers
        if not isinstance(staging, Staging):
            raise InvariantBroken("a plan was filled into buffers that are not this executor's")
        landing, clock = _Landing(plan, staging, beside, self._peers), staging.clock
        bound = [(slot, bindings[at]) for slot, at in plan.bound.tolist()]
        samples = self._fill(plan, staging, bound, beside)
        clock.start()
        self._plan.receive(staging)
        self._update_slots(plan, bound)
        if beside.rows:
            scored = self._scored(plan)
            hidden = self._forward(plan, samples, beside, whole=beside.whole or bool(scored))
            clock.mark()
            for row, (targets, k) in scored.items():
                landing.prompt_logprobs[row] = self._score(plan, row, hidden, targets, k)
        landing.samples = samples
        return landing

    @torch.inference_mode()
    def _enqueue_samples(self, landing: _Landing, masked: Sequence[int], masks: Sequence[Mask]) -> None:
        """The rest of a step, once its masks are known."""
        plan, staging = landing.plan, landing.staging
        if masked:
            staging.set_masks(masked, masks)
            self._tables.set_masks(staging, len(masked))
        if any(landing.beside.samples):
            self._head(plan, landing.samples, landing)
        if landing.beside.rows:
            staging.results.copy_(self._step.results, non_blocking=True)
        staging.clock.mark()

    def _fill(self, plan: Plan, staging: Staging, bound: list[tuple[int, Binding]], beside: Beside) -> int:
        """Complete the step's host memory, padding included. The number of samples with padding, that of any group."""
        self._check(plan)
        for at, (slot, binding) in enumerate(bound):
            self._tables.write_record(staging, at, slot, binding)
        rows, sampled, most = plan.num_rows, plan.num_samples, max(beside.samples)
        if beside.decode:
            size = self._graphs.size(beside.rows)
            staging.num_rows[0] = rows
            staging.row_slot[rows:size] = self._tables.padding
            staging.row_new[rows:size] = 0
            staging.row_computed[rows:size] = 0
            staging.token_ids[rows:size] = 0
        else:
            size = self._graphs.size(most) if most else 0
        staging.sample_slot[:sampled] = plan.row_slot[plan.sample_rows]
        staging.sample_slot[sampled:size] = -1
        staging.sample_token[:sampled] = np.cumsum(plan.row_new)[plan.sample_rows] - 1
        staging.sample_token[sampled:size] = 0
        return size

    def _check(self, plan: Plan) -> None:
        if plan.num_copies:
            raise InvariantBroken(f"step {plan.step} copies blocks of a second tier, which this executor does not have")
        blocks = plan.table_delta[:, 2]
        if plan.num_deltas and not 0 <= blocks.min() <= blocks.max() < self._num_blocks:
            raise InvariantBroken(f"step {plan.step} names a block outside the {self._num_blocks} of the cache")

    def _update_slots(self, plan: Plan, bound: list[tuple[int, Binding]]) -> None:
        """Releases, then bindings, then table deltas: a slot may change hands within one plan."""
        for slot in plan.released.tolist():
            self._tables.release(slot)
            self._prompt_scores.pop(slot, None)
        if bound:
            self._tables.bind(self._plan, bound)
            for slot, binding in bound:
                self._prompt_scores.pop(slot, None)
                if (scores := PromptScores.of(binding)) is not None:
                    self._prompt_scores[slot] = scores
        if plan.num_deltas:
            self._tables.map_blocks(self._plan.table_delta[: plan.num_deltas])

    def _forward(self, plan: Plan, samples: int, beside: Beside, *, whole: bool) -> torch.Tensor | None:
        """Compute the rows. All their hidden states [T, H] if `whole`, or if not all rows of all groups decode, else
        None."""
        if beside.decode and not whole:
            self._graphs.decode(samples)
            return None
        new = plan.row_new
        kv_lens = tuple((plan.row_computed + new).tolist())
        return self._step.prefill(plan.num_decode, tuple(new.tolist()), kv_lens, samples, beside.tokens)

    def _head(self, plan: Plan, samples: int, landing: _Landing) -> None:
        slots = plan.row_slot[plan.sample_rows]
        if not self._tables.unusual or self._tables.unusual.isdisjoint(slots.tolist()):
            self._graphs.head(samples)
            return
        banned = [(row, slot) for row, slot in enumerate(slots.tolist()) if slot in self._tables.bad_words]
        scored = np.flatnonzero(self._tables.features[slots] & Feature.LOGPROBS)
        logits = self._step.logits(samples)
        raw = rows = None
        if len(scored):
            rows = uploaded(scored, self._device)
            raw = torch.log_softmax(logits[rows], 1)
        for row, slot in banned:
            self._tables.bad_words[slot].apply(logits[row])
        self._step.choose(logits)
        for _, slot in banned:
            self._tables.bad_words[slot].append(self._tables.state.last_token[slot : slot + 1])
        if raw is not None and rows is not None:
            k = int(self._tables.num_logprobs[slots[scored]].max())
            tokens = self._step.tokens[rows].long().clamp(min=0)
            landing.logprobs = (scored, pick_on_device(raw, tokens, k))

    def _scored(self, plan: Plan) -> dict[int, tuple[Int64Array, int]]:
        """Rows whose chunk is followed by prompt tokens that are to be scored: the tokens, and how many best."""
        if not self._prompt_scores:
            return {}
        asked = ((row, self._prompt_scores.get(slot)) for row, slot in enumerate(plan.row_slot.tolist()))
        found = (
            (row, scores.targets(int(plan.row_computed[row]), int(plan.row_new[row])), scores.k)
            for row, scores in asked
            if scores is not None
        )
        return {row: (targets, k) for row, targets, k in found if len(targets)}

    def _score(
        self, plan: Plan, row: int, hidden: torch.Tensor | None, targets: Int64Array, k: int
    ) -> list[DeviceLogprobs]:
        assert hidden is not None
        at = int(plan.row_new[:row].sum())
        token_ids = uploaded(targets, self._device)
        return score_on_device(self._model.logits, hidden[at : at + len(targets)], token_ids, self._vocab_size, k)

    def _clear_plan(self) -> None:
        """A plan of padding: no row computes, no sample counts."""
        self._plan.row_slot.fill_(self._tables.padding)
        plan = self._plan
        for array in (plan.num_rows, plan.row_new, plan.row_computed, plan.token_ids, plan.sample_token):
            array.zero_()
        self._plan.sample_slot.fill_(-1)


@dataclass
class _Landing:
    """What a launched step leaves behind on the host."""

    plan: Plan
    staging: Staging
    beside: Beside
    peers: Peers | None
    samples: int = 0
    logprobs: tuple[Int64Array, DeviceLogprobs] | None = None
    prompt_logprobs: dict[int, list[DeviceLogprobs]] = field(default_factory=dict)

    def result(self) -> StepResult:
        """Wait for the step, and read what it gave. Raises what the device found wrong with it."""
        plan = self.plan
        forward, *sample = self.staging.clock.wait()
        faults, *groups = self.staging.results.numpy()
        if fault := int(np.bitwise_or.reduce(faults[: plan.num_rows], initial=0)):
            found = "; ".join(text for bit, text in FAULTS.items() if fault & bit)
            raise InvariantBroken(f"step {plan.step}: {found}")
        counts = self.beside.samples
        tokens = np.concatenate([decided[:count] for decided, count in zip(groups, counts, strict=True)])
        logprobs = None
        if self.logprobs is not None:
            rows, scores = self.logprobs
            own = groups[0 if self.peers is None else self.peers.group][: plan.num_samples]
            logprobs = spread(scores.landed(), rows, own.astype(np.int64))
        result = StepResult(
            step=plan.step,
            tokens=tokens[:, None],
            num_tokens=np.ones(len(tokens), dtype=np.int32),
            logprobs=logprobs,
            prompt_logprobs={
                row: joined([part.landed() for part in parts]) for row, parts in self.prompt_logprobs.items()
            },
            times=StepTimes(forward, sum(sample)),
        )
        return result if self.peers is None or not self.beside.tells else told_by_all(result, self.beside, self.peers)
