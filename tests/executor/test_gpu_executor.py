"""The GPU executor's tables, padding and sampling, run as they are on a CPU with a model that notices every mistake."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from tests.executor.hash_model import VOCAB, HashModel, direct_logits
from tests.executor.random_planner import RandomPlanner
from tests.executor.test_cpu_executor import (
    LIMITS,
    NUM_BLOCKS,
    binding_of,
    check_against_direct_computation,
    drive,
    nothing_but_a_release,
    plan_of,
    requests,
)
from tokenspeed.batch import NOT_FINITE, ON_DEVICE, Plan, PlanBuffers
from tokenspeed.errors import InvariantBroken
from tokenspeed.executor.device_step import Model, StepOps
from tokenspeed.executor.gpu import GpuExecutor
from tokenspeed.executor.graphs import MAX_BUCKETS, buckets
from tokenspeed.executor.interface import Binding
from tokenspeed.kernels.reference.decode_inputs import decode_inputs
from tokenspeed.kernels.reference.sample import sample
from tokenspeed.layers.attention import AttentionInput
from tokenspeed.layers.forward import ForwardInput, LayerKV, TokenInput
from tokenspeed.models.causal_lm import Pieces

CPU = torch.device("cpu")
OPS = StepOps(decode_inputs, sample)


def executor_of(model: Model) -> GpuExecutor:
    kv = [
        tuple(torch.zeros(NUM_BLOCKS, LIMITS.block_size, *shape) for _, shape in spec.tensors)
        for spec in model.kv_spec
    ]
    return GpuExecutor(model, kv, limits=LIMITS, vocab_size=VOCAB, step_ops=OPS, device=CPU)


@pytest.mark.parametrize("seed", range(8))
def test_every_plan_gives_the_tokens_of_a_direct_computation(seed: int) -> None:
    """Chunked, batched, preempted, padded, with slots and blocks reused; a step at a time and overlapped."""
    texts = []
    preempted = 0
    for depth in (0, 1):
        asked = requests(seed)
        executor = executor_of(HashModel())
        asyncio.run(drive(executor, RandomPlanner(LIMITS, NUM_BLOCKS, asked, random.Random(seed)), depth))
        executor.close()
        for request in asked:
            check_against_direct_computation(request)
        texts.append([request.output for request in asked])
        preempted += sum(request.num_bound > 1 for request in asked)
    assert texts[0] == texts[1]
    assert preempted > 0


def test_a_captured_size_is_never_far_above_the_rows_and_there_are_few() -> None:
    for max_rows in range(1, 1100):
        sizes = buckets(max_rows)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == max_rows
        assert len(sizes) <= MAX_BUCKETS
        assert all(after <= 2 * size for size, after in pairwise(sizes))


class OnePiece(HashModel):
    """Without an attention: all of it is a piece, which notes of how many tokens it is."""

    num_pieces = attended_width = 1

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    @property
    def pieces(self) -> Pieces:
        return self

    @pieces.setter
    def pieces(self, none: None) -> None:
        """A hash model has none."""

    def piece(
        self, index: int, x: torch.Tensor | None, residual: torch.Tensor | None, tokens: TokenInput,
        kv: Sequence[LayerKV],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        self.sizes.append(len(tokens.token_ids))
        return torch.zeros(len(tokens.token_ids), 1), None

    def attend(
        self, index: int, q: torch.Tensor, inputs: AttentionInput, kv: Sequence[LayerKV], out: torch.Tensor | None
    ) -> torch.Tensor:
        raise AssertionError("there is no attention")


def test_steps_with_prompts_go_in_pieces_up_to_the_largest_size_that_fits() -> None:
    model = OnePiece()
    executor = executor_of(model)
    assert LIMITS.max_tokens == 20, "one size of 16 fits"

    async def run() -> None:
        step = 0
        for count, in_pieces in ((2, True), (16, True), (17, False), (20, False)):
            model.sizes, model.inputs, step = [], [], step + 1
            deltas = [(0, at, at) for at in range(5)]
            plan = plan_of(executor.new_buffers(), [(0, 0, range(count))], step=step, bound=[0], deltas=deltas)
            await executor.launch(plan, [binding_of(range(count))]).tokens()
            assert (model.sizes, len(model.inputs)) == ([16], 0) if in_pieces else ([], 1)
        model.sizes, model.inputs = [], []
        plan = plan_of(executor.new_buffers(), [(0, 20, (ON_DEVICE,))], step=step + 1, deltas=[(0, 5, 5)])
        await executor.launch(plan, []).tokens()
        assert not model.sizes and len(model.inputs) == 1, "decode rows alone are a graph of their own"

    asyncio.run(run())
    executor.close()


def test_warming_up_leaves_no_trace() -> None:
    class Careless(HashModel):
        """Computes nothing of a step that only warms up: its tokens share one block."""

        def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
            return torch.zeros(len(inputs.token_ids), 1)

    model = Careless()
    executor = executor_of(model)
    executor.warm_up()
    model.__class__ = HashModel

    async def run() -> None:
        plan = plan_of(executor.new_buffers(), [(0, 0, (1, 2))], bound=[0], deltas=[(0, 0, 3)])
        first = await executor.launch(plan, [binding_of([1, 2])]).tokens()
        assert first.tokens.tolist() == [[int(direct_logits([1, 2]).argmax())]]
        plan = plan_of(executor.new_buffers(), [(0, 2, (ON_DEVICE,))], step=2)
        second = await executor.launch(plan, []).tokens()
        assert second.tokens.tolist() == [[int(direct_logits([1, 2, int(first.tokens[0, 0])]).argmax())]]

    asyncio.run(run())
    executor.close()


class Broken(Exception):
    pass


class BrokenModel(HashModel):
    """Raises in its second step."""

    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        if self.inputs:
            raise Broken("no such luck")
        return super().forward(inputs, kv)


def first_plan(executor: GpuExecutor, step: int = 1) -> Plan:
    return plan_of(executor.new_buffers(), [(0, 0, (1, 2))], step=step, bound=[0], deltas=[(0, 0, 3)])


def test_what_a_step_raises_comes_out_of_its_flight_and_of_all_later_ones() -> None:
    async def run() -> None:
        executor = executor_of(BrokenModel())
        flights = [executor.launch(first_plan(executor, step=step), [binding_of([1, 2])]) for step in range(1, 5)]
        assert (await flights[0].tokens()).step == 1
        for flight in flights[1:]:
            with pytest.raises(Broken, match="no such luck"):
                await flight.tokens()
        executor.close()

    asyncio.run(run())


def test_close_ends_the_thread() -> None:
    executor = executor_of(HashModel())
    flight = executor.launch(first_plan(executor), [binding_of([1, 2])])
    executor.close()
    executor.close()
    assert asyncio.run(flight.tokens()).step == 1
    assert not any(thread.name == "tokenspeed-gpu-executor" for thread in threading.enumerate())
    with pytest.raises(InvariantBroken, match="closed"):
        executor.launch(first_plan(executor), [])


def test_a_row_that_is_not_finite_ends_alone_and_the_step_behind_it_runs() -> None:
    class Poisoned(HashModel):
        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            out = super().logits(hidden)
            if len(self.inputs) == 1:
                out[0, 11] = math.nan
            return out

    async def run() -> None:
        executor = executor_of(Poisoned())
        rows = [(0, 0, (1, 2)), (1, 0, (4,))]
        plan = plan_of(executor.new_buffers(), rows, bound=[0, 1], deltas=[(0, 0, 3), (1, 0, 5)])
        flights = [
            executor.launch(plan, [binding_of([1, 2]), binding_of([4])]),
            executor.launch(plan_of(executor.new_buffers(), [(0, 2, (-1,)), (1, 1, (-1,))], step=2), []),
        ]
        first, second = [await flight.tokens() for flight in flights]
        healthy = int(direct_logits([4]).argmax())
        assert first.tokens.tolist() == [[NOT_FINITE], [healthy]]
        assert second.tokens[1, 0] == int(direct_logits([4, healthy]).argmax())
        executor.close()

    asyncio.run(run())


def test_a_plan_that_samples_nothing_gives_an_empty_result() -> None:
    async def run() -> None:
        executor = executor_of(HashModel())
        buffers = executor.new_buffers()
        buffers.released[0] = 2
        result = await executor.launch(nothing_but_a_release(buffers), []).tokens()
        assert result.step == 9
        assert result.tokens.shape == (0, 1)
        assert result.num_tokens.shape == (0,)
        assert result.logprobs is None
        executor.close()

    asyncio.run(run())


def fault(
    rows: Sequence[tuple[int, int, Sequence[int]]],
    *,
    bound: Sequence[int] = (),
    deltas: Sequence[tuple[int, int, int]] = (),
    copies: int = 0,
    buffers: PlanBuffers | None = None,
) -> str:
    class Blind(HashModel):
        """Does not look at what a contradictory plan makes of the cache."""

        def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
            return torch.zeros(len(inputs.token_ids), 1)

    executor = executor_of(Blind())
    bindings: list[Binding] = [binding_of([1, 2])] if bound else []
    plan = plan_of(buffers or executor.new_buffers(), rows, bound=bound, deltas=deltas, copies=copies)
    try:
        with pytest.raises(InvariantBroken) as caught:
            asyncio.run(executor.launch(plan, bindings).tokens())
    finally:
        executor.close()
    return str(caught.value)


def test_a_plan_that_contradicts_the_device_stops_the_engine() -> None:
    row = [(0, 0, (1, 2))]
    assert "no block" in fault(row, bound=[0])
    assert "no block" in fault([(0, 0, (1,))], bound=[0])
    assert "outside" in fault(row, bound=[0], deltas=[(0, 0, NUM_BLOCKS)])
    assert "outside" in fault(row, bound=[0], deltas=[(0, 0, -1)])
    assert "disagree" in fault([(1, 7, (1, 2))], deltas=[(1, 1, 0), (1, 2, 1)])
    assert "second tier" in fault(row, bound=[0], deltas=[(0, 0, 3)], copies=1)
    assert "not this executor's" in fault(row, bound=[0], buffers=PlanBuffers(LIMITS))
