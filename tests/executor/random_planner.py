"""A scheduler for tests that plans at random: any legal plan, however odd, must give the same tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tokenspeed.batch import NOT_FINITE, ON_DEVICE, BatchLimits, Logprobs, Plan, PlanBuffers, StepResult
from tokenspeed.executor.interface import Binding
from tokenspeed.request import SamplingParams


@dataclass
class Request:
    """`pending` samples are in flight; `computed` and `in_flight` count what was planned."""

    params: SamplingParams
    prompt: list[int]
    seed: int
    num_outputs: int
    stop_ids: tuple[int, ...] = ()
    output: list[int] = field(default_factory=list)
    slot: int | None = None
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    pending: int = 0
    in_flight: int = 0
    logprobs: list[float] = field(default_factory=list)
    prompt_logprobs: dict[int, float] = field(default_factory=dict)
    num_bound: int = 0

    @property
    def known(self) -> int:
        return len(self.prompt) + len(self.output) + self.pending

    @property
    def done(self) -> bool:
        return len(self.output) >= self.num_outputs or self.output[-1:] == [NOT_FINITE]

    def binding(self) -> Binding:
        tokens = np.array(self.prompt + self.output, dtype=np.int32)
        return Binding(self.params, tokens, len(self.prompt), self.seed, np.array(self.stop_ids, dtype=np.int32))


@dataclass
class Step:
    plan: Plan
    bindings: list[Binding]
    rows: list[Request]
    sampled: list[Request]


class RandomPlanner:
    """Chunks, preempts, and hands out slots and blocks, last in, first out, as `rng` pleases.

    Prompts scored again, in other chunks, must score the same within `tolerance`.
    """

    def __init__(
        self,
        limits: BatchLimits,
        num_blocks: int,
        requests: Sequence[Request],
        rng: random.Random,
        tolerance: float = 0.0,
    ) -> None:
        self.limits, self.rng, self.tolerance = limits, rng, tolerance
        self.requests = list(requests)
        self.free_slots = list(range(limits.max_rows))
        self.free_blocks = list(range(num_blocks))
        self.released: list[int] = []
        self.step = 0

    @property
    def finished(self) -> bool:
        return all(request.done and request.in_flight == 0 for request in self.requests)

    def plan(self, buffers: PlanBuffers) -> Step | None:
        self._give_back()
        deltas: list[tuple[int, int, int]] = []
        bound: list[Request] = []
        chunks: list[tuple[Request, int]] = []
        room = self.limits.max_tokens
        for request in self.rng.sample(self.requests, len(self.requests)):
            wants = not request.done and len(request.output) + request.pending < request.num_outputs
            if not wants or room == 0 or self.rng.random() < 0.1:
                continue
            if request.slot is None:
                if not self.free_slots or self.rng.random() < 0.3:
                    continue
                request.slot = self.free_slots.pop()
                request.num_bound += 1
                bound.append(request)
            new = self._chunk(request, room, deltas)
            if new:
                chunks.append((request, new))
                room -= new
        if not chunks:
            assert not bound or all(request.computed == 0 for request in bound)
            return self._fill(buffers, [], bound, deltas) if bound else None
        chunks.sort(key=lambda chunk: chunk[1] != 1)
        return self._fill(buffers, chunks, bound, deltas)

    def land(self, step: Step, result: StepResult) -> None:
        assert result.step == step.plan.step
        for request in step.rows:
            request.in_flight -= 1
        for index, request in enumerate(step.sampled):
            request.pending -= 1
            if not request.done:
                request.output.append(int(result.tokens[index, 0]))
                if request.params.logprobs is not None:
                    assert result.logprobs is not None
                    request.logprobs.append(float(result.logprobs.logprobs[index]))
        for row, scores in result.prompt_logprobs.items():
            self._collect(step.rows[row], int(step.plan.row_computed[row]), scores)

    def _collect(self, request: Request, computed: int, scores: Logprobs) -> None:
        for index, value in enumerate(scores.logprobs.tolist()):
            position = computed + 1 + index
            assert scores.token_ids[index] == request.prompt[position]
            assert abs(request.prompt_logprobs.setdefault(position, value) - value) <= self.tolerance

    def _give_back(self) -> None:
        """Slots of finished requests, and now and then of one that goes on: it is computed anew later."""
        for request in self.requests:
            if request.slot is not None and request.in_flight == 0 and (request.done or self.rng.random() < 0.05):
                self.released.append(request.slot)
                self.free_slots.append(request.slot)
                self.free_blocks += request.blocks
                request.slot, request.blocks, request.computed = None, [], 0

    def _chunk(self, request: Request, room: int, deltas: list[tuple[int, int, int]]) -> int:
        new = min(request.known - request.computed, room, self.rng.randint(1, 9))
        size = self.limits.block_size
        needed = -(-(request.computed + new) // size) - len(request.blocks)
        if needed > len(self.free_blocks):
            return 0
        for _ in range(needed):
            assert request.slot is not None
            block = self.free_blocks.pop()
            deltas.append((request.slot, len(request.blocks), block))
            request.blocks.append(block)
        return new

    def _fill(
        self,
        buffers: PlanBuffers,
        chunks: list[tuple[Request, int]],
        bound: list[Request],
        deltas: list[tuple[int, int, int]],
    ) -> Step:
        token = 0
        sampled: list[Request] = []
        for row, (request, new) in enumerate(chunks):
            assert request.slot is not None
            buffers.row_slot[row], buffers.row_new[row], buffers.row_computed[row] = request.slot, new, request.computed
            known = request.prompt + request.output + [ON_DEVICE] * request.pending
            buffers.token_ids[token : token + new] = known[request.computed : request.computed + new]
            token += new
            request.computed += new
            request.in_flight += 1
            if request.computed == request.known:
                buffers.sample_rows[len(sampled)] = row
                sampled.append(request)
                request.pending += 1
        buffers.table_delta[: len(deltas)] = np.array(deltas, dtype=np.int32).reshape(-1, 3)
        order = self.rng.sample(range(len(bound)), len(bound))
        for at, index in enumerate(order):
            slot = bound[index].slot
            assert slot is not None
            buffers.bound[at] = slot, index
        released, self.released = self.released, []
        buffers.released[: len(released)] = released
        self.step += 1
        num_decode = sum(new == 1 for _, new in chunks)
        plan = Plan(
            self.step, buffers, len(chunks), num_decode, token, len(deltas), len(sampled), len(bound), 0, len(released),
            allowed_prompt_tokens=0,
        )  # fmt: skip
        return Step(plan, [request.binding() for request in bound], [request for request, _ in chunks], sampled)
