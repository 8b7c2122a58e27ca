"""Two ranks' executors under the same random plans: the second samples nothing and has the tokens of the first."""

from __future__ import annotations

import asyncio
import dataclasses
import queue
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from msgspec import structs

from tests.executor.hash_model import VOCAB, HashModel
from tests.executor.random_planner import RandomPlanner
from tests.executor.test_cpu_executor import (
    LIMITS,
    NUM_BLOCKS,
    check_against_direct_computation,
    drive,
    requests,
)
from tests.executor.test_gpu_executor import CPU, OPS
from tokenspeed.batch import Plan, PlanBuffers, StepResult
from tokenspeed.executor.cpu import CpuExecutor
from tokenspeed.executor.gpu import GpuExecutor
from tokenspeed.executor.interface import Binding, Executor, Flight, Mask, Peers


class Queue:
    """What two ranks of one group share: `rank` 0 puts, the other takes."""

    num_groups, group = 1, 0

    def __init__(self, rank: int, tensors: queue.Queue[torch.Tensor]) -> None:
        self.decides = rank == 0
        self._tensors = tensors

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.decides:
            self._tensors.put(tokens.clone())
        else:
            tokens.copy_(self._tensors.get(timeout=60))
        return tokens.unsqueeze(0)

    def told(self, data: bytes) -> list[bytes]:
        raise AssertionError("one group has nobody to tell")


def cpu_executor(peers: Peers) -> Executor:
    return CpuExecutor(
        HashModel(), num_blocks=NUM_BLOCKS, limits=LIMITS, vocab_size=VOCAB, dtype=torch.float32, num_threads=1,
        peers=peers,
    )  # fmt: skip


def gpu_executor(peers: Peers) -> Executor:
    model = HashModel()
    kv = [
        tuple(torch.zeros(NUM_BLOCKS, LIMITS.block_size, *shape) for _, shape in spec.tensors)
        for spec in model.kv_spec
    ]
    return GpuExecutor(model, kv, limits=LIMITS, vocab_size=VOCAB, step_ops=OPS, device=CPU, peers=peers)


class Both:
    """The executors of two ranks: each plan is launched on both, and both must land with the same tokens."""

    def __init__(self, first: Executor, second: Executor) -> None:
        self.first, self.second = first, second
        self.new_buffers = first.new_buffers
        self.samples = 0

    def launch(self, plan: Plan, bindings: Sequence[Binding]) -> Flight:
        mine: PlanBuffers = self.second.new_buffers()
        mine.flat[:] = plan.buffers.flat
        first = self.first.launch(plan, bindings)
        unseeded = [dataclasses.replace(binding, seed=0) for binding in bindings]
        return BothFlights(self, first, self.second.launch(structs.replace(plan, buffers=mine), unseeded))


class BothFlights:
    masked: Sequence[int] = ()

    def __init__(self, both: Both, first: Flight, second: Flight) -> None:
        self._both, self._first, self._second = both, first, second

    def mask(self, masks: Sequence[Mask]) -> None: ...

    async def tokens(self) -> StepResult:
        results = [await self._first.tokens(), await self._second.tokens()]
        assert np.array_equal(results[0].tokens, results[1].tokens)
        self._both.samples += len(results[0].tokens)
        return results[0]


@pytest.mark.parametrize("make", [cpu_executor, gpu_executor], ids=["cpu", "gpu"])
@pytest.mark.parametrize(("seed", "depth"), [(0, 0), (1, 1), (2, 1)])
def test_what_one_rank_decides_the_other_computes_with(make: object, seed: int, depth: int) -> None:
    """The model of either rank would give other tokens after a wrong one, or none at all."""
    tensors: queue.Queue[torch.Tensor] = queue.Queue()
    first, second = (make(Queue(rank, tensors)) for rank in range(2))  # type: ignore[operator]
    both = Both(first, second)
    asked = requests(seed)
    asyncio.run(drive(both, RandomPlanner(LIMITS, NUM_BLOCKS, asked, random.Random(seed)), depth))  # type: ignore[arg-type]
    for executor in (first, second):
        executor.close()
    for request in asked:
        check_against_direct_computation(request)
    assert both.samples > 40 and tensors.empty()
    assert inputs_of(first) == inputs_of(second)


def inputs_of(executor: object) -> list[list[int]]:
    """The tokens of every step that the executor's model was told to compute, without padding."""
    model = executor._model if isinstance(executor, GpuExecutor) else executor._device._model  # type: ignore[attr-defined]
    return [inputs.token_ids[: int(inputs.query_start[-1])].tolist() for inputs in model.inputs]
