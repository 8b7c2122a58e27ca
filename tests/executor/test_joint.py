"""Four ranks' executors in two groups under random plans of two pools: each group computes its own rows, all ranks get
all tokens and agree on what they have to, and rank 0 gets every log-probability."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.executor import joint_jobs
from tests.executor.hash_model import VOCAB, HashModel
from tests.executor.random_planner import RandomPlanner, Step
from tests.executor.test_cpu_executor import LIMITS, NUM_BLOCKS, check_against_direct_computation, requests
from tests.executor.test_gpu_executor import CPU, OPS
from tests.models.families import write
from tests.parallel.pool import started
from tests.toy import greedy
from tokenspeed.batch import Int32Array, JointBuffers, JointPlan, Logprobs, Plan, PlanBuffers, StepResult
from tokenspeed.errors import InvariantBroken
from tokenspeed.executor.cpu import CpuExecutor
from tokenspeed.executor.gpu import GpuExecutor
from tokenspeed.executor.interface import Binding, Flight, Mask
from tokenspeed.executor.joint import JointExecutor
from tokenspeed.layers.forward import ForwardInput, LayerKV
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.request import SamplingParams

RANKS, GROUPS = 4, 2
BLOCKS = (NUM_BLOCKS, NUM_BLOCKS - 6)
"""Of the pools, which need not have the same."""


class Meeting:
    """All ranks give something, each from its own thread, and each gets what all gave."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(RANKS, timeout=60)
        self._given: list[Any] = [None] * RANKS

    def of(self, rank: int, value: Any) -> list[Any]:
        self._given[rank] = value
        self._barrier.wait()
        everyones = list(self._given)
        self._barrier.wait()
        return everyones


class Seat:
    """One rank's `Peers`: ranks 0 and 1 are a group, 2 and 3 the other."""

    num_groups = GROUPS

    def __init__(self, rank: int, shared: Meeting, told: Meeting) -> None:
        self.rank, self.group, self.decides = rank, rank // 2, rank % 2 == 0
        self._shared, self._told = shared, told
        self.times_told = 0

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        everyones = torch.stack(self._shared.of(self.rank, tokens.clone())[::2])
        tokens.copy_(everyones[self.group])
        return everyones

    def told(self, data: bytes) -> list[bytes]:
        self.times_told += 1
        everyones = self._told.of(self.rank, data)
        return everyones[::2] if self.rank == 0 else []


class GroupModel(HashModel):
    """Computes nothing where only the other group has rows."""

    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        if len(inputs.token_ids):
            return super().forward(inputs, kv)
        self.inputs.append(inputs)
        return torch.zeros(0, 1)


def cpu_executor(model: HashModel, seat: Seat) -> CpuExecutor:
    return CpuExecutor(
        model, num_blocks=BLOCKS[seat.group], limits=LIMITS, vocab_size=VOCAB, dtype=torch.float32, num_threads=1,
        peers=seat,
    )  # fmt: skip


def gpu_executor(model: HashModel, seat: Seat) -> GpuExecutor:
    kv = [
        tuple(torch.zeros(BLOCKS[seat.group], LIMITS.block_size, *shape) for _, shape in spec.tensors)
        for spec in model.kv_spec
    ]
    return GpuExecutor(model, kv, limits=LIMITS, vocab_size=VOCAB, step_ops=OPS, device=CPU, peers=seat)


class AllRanks:
    """The executors of all ranks, each launched from a thread of its own, as in a process of its own."""

    def __init__(self, make: Any) -> None:
        shared, told = Meeting(), Meeting()
        self.seats = [Seat(rank, shared, told) for rank in range(RANKS)]
        self.models = [GroupModel() for _ in range(RANKS)]
        self.executors = [
            JointExecutor(make(model, seat), seat, BLOCKS) for model, seat in zip(self.models, self.seats, strict=True)
        ]
        self._threads = [ThreadPoolExecutor(1) for _ in range(RANKS)]

    def new_buffers(self) -> list[PlanBuffers]:
        return [executor.new_buffers() for executor in self.executors]

    def launch(self, plans: Sequence[Plan], bindings: Sequence[Binding], masks: Sequence[Mask] = ()) -> list[Flight]:
        """On a device without streams a launch lasts until ranks have met, and masked ones meet in `mask`."""

        def one(executor: JointExecutor, plan: Plan) -> Flight:
            flight = executor.launch(plan, bindings)
            if flight.masked:
                flight.mask(masks)
            return flight

        launched = [
            thread.submit(one, executor, plan)
            for thread, executor, plan in zip(self._threads, self.executors, plans, strict=True)
        ]
        return [flight.result(60) for flight in launched]

    def close(self) -> None:
        for executor, thread in zip(self.executors, self._threads, strict=True):
            executor.close()
            thread.shutdown()


Steps = list[Step | None]


def planned(planners: Sequence[RandomPlanner], number: int, buffers: Sequence[Any]) -> tuple[Steps, list[JointPlan]]:
    """The next step of both pools, in the buffers of every rank; no plans where neither has anything to do."""
    steps = [planner.plan(part) for planner, part in zip(planners, buffers[0].parts, strict=True)]
    if steps == [None] * GROUPS:
        return steps, []
    plans = []
    for own in buffers:
        for to, at in zip(own.parts, buffers[0].parts, strict=True):
            to.flat[:] = at.flat
            to.bound_ids[:] = at.bound_ids
        parts = [
            None if step is None else Plan(step.plan.step, part, *_counts(step.plan))
            for step, part in zip(steps, own.parts, strict=True)
        ]
        plans.append(JointPlan.of(number, parts, own))
    return steps, plans


def _counts(plan: Plan) -> tuple[int, ...]:
    return (
        plan.num_rows, plan.num_decode, plan.num_tokens, plan.num_deltas, plan.num_samples, plan.num_bound,
        plan.num_copies, plan.num_released, plan.allowed_prompt_tokens,
    )  # fmt: skip


def part_of(result: StepResult, plan: JointPlan, pool: int) -> StepResult:
    """What a joint result has of one pool, as if it had been alone."""
    before, part = plan.parts[:pool], plan.parts[pool]
    first, row = sum(each.num_samples for each in before), sum(each.num_rows for each in before)
    own = slice(first, first + part.num_samples)
    logprobs = None
    if result.logprobs is not None:
        found = result.logprobs
        arrays = (found.token_ids, found.logprobs, found.ranks, found.top_ids, found.top_logprobs)
        logprobs = Logprobs(*(array[own] for array in arrays))  # type: ignore[arg-type]
    prompts = {at - row: scores for at, scores in result.prompt_logprobs.items() if 0 <= at - row < part.num_rows}
    return StepResult(part.step, result.tokens[own], result.num_tokens[own], logprobs, prompts, result.times)


async def drive(ranks: AllRanks, planners: Sequence[RandomPlanner], depth: int) -> int:
    """The engine's loop in small; how many steps there were."""
    buffers = [ranks.new_buffers() for _ in range(depth + 1)]
    flights: deque[tuple[Steps, JointPlan, list[Flight]]] = deque()
    number = 0
    while flights or not all(planner.finished for planner in planners):
        steps, plans = planned(planners, number, buffers[number % (depth + 1)])
        if plans:
            bindings = [binding for step in steps if step is not None for binding in step.bindings]
            flights.append((steps, plans[0], ranks.launch(plans, bindings)))
            number += 1
        if len(flights) > depth or (not plans and flights):
            landed, plan, flown = flights.popleft()
            results = await asyncio.gather(*(flight.tokens() for flight in flown))
            assert all(result.tokens.tolist() == results[0].tokens.tolist() for result in results)
            assert {result.step for result in results} == {plan.step}
            told = [result.logprobs is not None or bool(result.prompt_logprobs) for result in results]
            assert not any(told[1:]), "rank 0 alone answers requests"
            for pool, (planner, step) in enumerate(zip(planners, landed, strict=True)):
                if step is not None:
                    planner.land(step, part_of(results[0], plan, pool))
    return number


@pytest.mark.parametrize("make", [cpu_executor, gpu_executor], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("seed", "depth"), [(0, 0), (1, 1), (2, 1)])
def test_each_group_computes_its_own_and_all_have_the_tokens_of_all(make: Any, seed: int, depth: int) -> None:
    ranks = AllRanks(make)
    asked = [requests(seed), requests(seed + 100)[: 3 + seed]]  # the second is done before the first
    planners = [
        RandomPlanner(LIMITS, blocks, of_pool, random.Random(seed + blocks))
        for blocks, of_pool in zip(BLOCKS, asked, strict=True)
    ]
    number = asyncio.run(drive(ranks, planners, depth))
    ranks.close()
    for request in [*asked[0], *asked[1]]:
        check_against_direct_computation(request)
    agreed = [[(each.padded_tokens, each.num_tokens is None) for each in model.inputs] for model in ranks.models]
    assert agreed == [agreed[0]] * RANKS and 30 < len(agreed[0]) <= number
    idle = [sum(not len(each.token_ids) or each.query_lens == () for each in model.inputs) for model in ranks.models]
    assert ranks.models[0].inputs and (idle[2] > 0 or make is gpu_executor), "a group without rows takes part"
    assert len({seat.times_told for seat in ranks.seats}) == 1 and 0 < ranks.seats[0].times_told < number


def only(*allowed: int) -> Int32Array:
    words = np.zeros(-(-VOCAB // 32), dtype=np.int32)
    for token in allowed:
        words[token // 32] |= np.int32(1 << token % 32)
    return words


@pytest.mark.parametrize("make", [cpu_executor, gpu_executor], ids=["cpu", "gpu"])
def test_masks_reach_the_rank_that_decides(make: Any) -> None:
    """Of two rows in one group and one in the other only some are masked; slots are those of the joint plan."""
    ranks = AllRanks(make)
    buffers = ranks.new_buffers()
    plans = []
    for own in buffers:
        assert isinstance(own, JointBuffers)
        parts = []
        for part, rows in zip(own.parts, (2, 1), strict=True):
            part.row_slot[:rows], part.row_new[:rows], part.row_computed[:rows] = range(rows), 1, 0
            part.token_ids[:rows], part.sample_rows[:rows] = range(3, 3 + rows), range(rows)
            part.table_delta[:rows] = [(row, 0, row) for row in range(rows)]
            part.bound[:rows] = [(row, row) for row in range(rows)]
            parts.append(Plan(1, part, rows, rows, rows, rows, rows, rows, 0, 0, 9))
        plans.append(JointPlan.of(7, parts, own))
    bindings = [
        Binding(SamplingParams(temperature=0.0), np.array([token], dtype=np.int32), 1, 0, only()[:0], masked=masked)
        for token, masked in ((3, False), (4, True), (3, True))
    ]

    async def run() -> list[StepResult]:
        flights = ranks.launch(plans, bindings, [only(50), only(60)])
        assert [list(flight.masked) for flight in flights] == [[1, LIMITS.max_rows]] * RANKS
        return list(await asyncio.gather(*(flight.tokens() for flight in flights)))

    results = asyncio.run(run())
    assert all(result.tokens[1:].ravel().tolist() == [50, 60] and result.step == 7 for result in results)
    ranks.close()


def test_a_plan_of_another_number_of_pools_is_not_launched() -> None:
    ranks = AllRanks(cpu_executor)
    part = PlanBuffers(LIMITS)
    with pytest.raises(InvariantBroken, match="as many pools"):
        ranks.executors[0].launch(Plan(1, part, *[0] * 9), [])
    ranks.close()


def test_groups_of_processes_generate_what_transformers_does(tmp_path: Path) -> None:
    """Control plane, a GPU's executor and a model over gloo: decode steps have the form that graphs are captured of."""
    reference = write(tmp_path, "deepseek-v3", seed=5, num_hidden_layers=2)
    arrivals = [(0, [5, 9, 300, 41]), (4, list(range(100, 130))), (6, list(range(3, 40, 2)))]
    wanted = [greedy(reference, prompt, 8) for _, prompt in arrivals]
    with started(4) as pool:
        for mesh in (Mesh.of(2, attn_dp=2, moe_ep=2), Mesh.of(4, attn_dp=2, moe_ep=4)):
            for answer in pool.over(mesh, joint_jobs.generated, tmp_path, arrivals, 8):
                assert answer["texts"] == wanted and answer["check"] is None, str(mesh)
                assert answer["idle"] >= 3, "decode steps in which one group had no row"
