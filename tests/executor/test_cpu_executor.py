"""The CPU executor with a model that notices every mistake, under random plans."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from tests.executor.hash_model import VOCAB, HashModel, direct_logits
from tests.executor.random_planner import RandomPlanner, Request, Step
from tests.executor.sampling_oracle import distribution, edited, number, possible_tokens
from tokenspeed.batch import NOT_FINITE, ON_DEVICE, BatchLimits, Plan, PlanBuffers, StepResult
from tokenspeed.errors import InvariantBroken
from tokenspeed.executor.cpu import CpuExecutor
from tokenspeed.executor.device_step import Model
from tokenspeed.executor.interface import Binding
from tokenspeed.layers.forward import ForwardInput, LayerKV
from tokenspeed.request import SamplingParams

LIMITS = BatchLimits(max_rows=4, max_tokens=20, max_blocks=12, block_size=4)
NUM_BLOCKS = 30
GREEDY = SamplingParams(temperature=0.0)


def executor_of(model: Model, limits: BatchLimits = LIMITS, num_blocks: int = NUM_BLOCKS) -> CpuExecutor:
    return CpuExecutor(
        model, num_blocks=num_blocks, limits=limits, vocab_size=VOCAB, dtype=torch.float32, num_threads=1
    )


async def drive(executor: CpuExecutor, planner: RandomPlanner, depth: int) -> None:
    """The engine's loop in small: launch, keep `depth` steps in flight, land in order."""
    buffers = [executor.new_buffers() for _ in range(depth + 1)]
    flights: deque[tuple[Step, asyncio.Task[StepResult]]] = deque()
    turn = 0
    while not planner.finished:
        step = planner.plan(buffers[turn])
        if step is not None:
            flight = executor.launch(step.plan, step.bindings)
            flights.append((step, asyncio.create_task(flight.tokens())))
            turn = (turn + 1) % len(buffers)
        if len(flights) > depth or (step is None and flights):
            landed, result = flights.popleft()
            planner.land(landed, await result)
    while flights:
        landed, result = flights.popleft()
        planner.land(landed, await result)


def requests(seed: int) -> list[Request]:
    rng = random.Random(seed)
    asked = [
        GREEDY,
        SamplingParams(),
        SamplingParams(temperature=0.8, top_p=0.9, logprobs=2),
        SamplingParams(temperature=0.0, repetition_penalty=1.5, frequency_penalty=0.5, prompt_logprobs=1),
        SamplingParams(top_k=5, presence_penalty=1.0),
        SamplingParams(temperature=0.0, min_tokens=4, logit_bias={5: 8.0}, logprobs=0),
        SamplingParams(min_p=0.1, bad_word_ids=((7,), (8, 9)), prompt_logprobs=0),
    ]
    return [
        Request(
            params,
            prompt=[rng.randrange(VOCAB) for _ in range(rng.randint(1, 25))],
            seed=rng.randrange(2**40),
            num_outputs=rng.randint(4, 16),
            stop_ids=(5,) if params.min_tokens else (),
        )
        for params in asked
    ]


def check_against_direct_computation(request: Request) -> None:
    assert len(request.output) == request.num_outputs
    for at, token in enumerate(request.output):
        output = request.output[:at]
        logits = direct_logits(request.prompt + output)
        x = edited(logits.tolist(), request.params, request.prompt, output, request.stop_ids)
        if request.params.greedy:
            assert token == int(x.argmax())
        else:
            u = number(request.seed, len(request.prompt) + at)
            assert token in possible_tokens(distribution(x, request.params), u)
        if request.params.logprobs is not None:
            exact = torch.log_softmax(logits.double(), 0)[token]
            assert request.logprobs[at] == pytest.approx(float(exact), abs=1e-5)
    if request.params.prompt_logprobs is not None:
        assert sorted(request.prompt_logprobs) == list(range(1, len(request.prompt)))
        for position, value in request.prompt_logprobs.items():
            exact = torch.log_softmax(direct_logits(request.prompt[:position]).double(), 0)[request.prompt[position]]
            assert value == pytest.approx(float(exact), abs=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_every_plan_gives_the_tokens_of_a_direct_computation(seed: int) -> None:
    """Chunked, batched, preempted, with slots and blocks reused; a step at a time and overlapped."""
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


# Single steps ------------------------------------------------------------------------------------------


def plan_of(
    buffers: PlanBuffers,
    rows: Sequence[tuple[int, int, Sequence[int]]],
    *,
    step: int = 1,
    bound: Sequence[int] = (),
    deltas: Sequence[tuple[int, int, int]] = (),
    copies: int = 0,
) -> Plan:
    """A plan of `rows` (slot, computed, token ids), all of which sample; `bound` slots take bindings 0, 1, …"""
    tokens = [token for _, _, ids in rows for token in ids]
    buffers.row_slot[: len(rows)] = [slot for slot, _, _ in rows]
    buffers.row_computed[: len(rows)] = [computed for _, computed, _ in rows]
    buffers.row_new[: len(rows)] = [len(ids) for _, _, ids in rows]
    buffers.token_ids[: len(tokens)] = tokens
    buffers.sample_rows[: len(rows)] = range(len(rows))
    for index, slot in enumerate(bound):
        buffers.bound[index] = slot, index
    for index, delta in enumerate(deltas):
        buffers.table_delta[index] = delta
    num_decode = sum(len(ids) == 1 for _, _, ids in rows)
    return Plan(
        step, buffers, len(rows), num_decode, len(tokens), len(deltas), len(rows), len(bound), copies, 0,
        allowed_prompt_tokens=0,
    )  # fmt: skip


def nothing_but_a_release(buffers: PlanBuffers) -> Plan:
    """Step 9: no rows, one slot released."""
    return Plan(9, buffers, 0, 0, 0, 0, 0, 0, 0, 1, allowed_prompt_tokens=0)


def binding_of(tokens: Sequence[int], params: SamplingParams = GREEDY) -> Binding:
    return Binding(params, np.array(tokens, dtype=np.int32), len(tokens), 0, np.zeros(0, dtype=np.int32))


def first_plan(executor: CpuExecutor, step: int = 1) -> Plan:
    return plan_of(executor.new_buffers(), [(0, 0, (1, 2))], step=step, bound=[0], deltas=[(0, 0, 3)])


class SlowModel(HashModel):
    """Computes when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.may_compute = threading.Event()

    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        assert self.may_compute.wait(10)
        return super().forward(inputs, kv)


def test_launch_returns_before_the_step_computes_and_the_event_loop_stays_free() -> None:
    async def run() -> None:
        model = SlowModel()
        executor = executor_of(model)
        flight = executor.launch(first_plan(executor), [binding_of([1, 2])])
        behind = executor.launch(plan_of(executor.new_buffers(), [(0, 2, (ON_DEVICE,))], step=2), [])
        waiting = asyncio.create_task(flight.tokens())
        ticks = 0
        while ticks < 20:
            await asyncio.sleep(0)
            ticks += 1
        assert not waiting.done()
        model.may_compute.set()
        first, second = await waiting, await behind.tokens()
        assert first.tokens.tolist() == [[int(direct_logits([1, 2]).argmax())]]
        assert second.tokens.tolist() == [[int(direct_logits([1, 2, first.tokens[0, 0]]).argmax())]]
        assert first.times.forward > 0
        assert first.times.sample > 0
        executor.close()

    asyncio.run(run())


def test_cancelling_the_wait_does_not_cancel_the_step() -> None:
    async def run() -> None:
        model = SlowModel()
        executor = executor_of(model)
        flight = executor.launch(first_plan(executor), [binding_of([1, 2])])
        waiting = asyncio.create_task(flight.tokens())
        await asyncio.sleep(0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        model.may_compute.set()
        assert (await flight.tokens()).step == 1
        executor.close()

    asyncio.run(run())


class Broken(Exception):
    pass


class BrokenModel(HashModel):
    """Raises in its second step."""

    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        if self.inputs:
            raise Broken("no such luck")
        return super().forward(inputs, kv)


def test_what_a_step_raises_comes_out_of_its_flight_and_of_all_later_ones() -> None:
    async def run() -> None:
        model = BrokenModel()
        executor = executor_of(model)
        flights = [
            executor.launch(first_plan(executor, step=step), [binding_of([1, 2])]) for step in range(1, 5)
        ]
        assert (await flights[0].tokens()).step == 1
        for flight in flights[1:]:
            with pytest.raises(Broken, match="no such luck"):
                await flight.tokens()
        executor.close()
        assert len(model.inputs) == 1

    asyncio.run(run())


def test_close_runs_what_is_queued_and_ends_the_thread() -> None:
    model = SlowModel()
    executor = executor_of(model)
    flight = executor.launch(first_plan(executor), [binding_of([1, 2])])
    threading.Timer(0.05, model.may_compute.set).start()
    executor.close()
    executor.close()
    assert asyncio.run(flight.tokens()).step == 1
    assert not any(thread.name == "tokenspeed-cpu-executor" for thread in threading.enumerate())
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
        deltas = [(0, 0, 3), (1, 0, 5)]
        plan = plan_of(executor.new_buffers(), rows, bound=[0, 1], deltas=deltas)
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


def fault(plan: Plan, bindings: Sequence[Binding]) -> str:
    executor = executor_of(HashModel())
    try:
        with pytest.raises(InvariantBroken) as caught:
            asyncio.run(executor.launch(plan, bindings).tokens())
    finally:
        executor.close()
    return str(caught.value)


def test_a_plan_that_contradicts_the_device_stops_the_engine() -> None:
    buffers = PlanBuffers(LIMITS)
    bound = [binding_of([1, 2])]
    assert "no block" in fault(plan_of(buffers, [(0, 0, (1, 2))], bound=[0]), bound)
    assert "outside" in fault(plan_of(buffers, [(0, 0, (1, 2))], bound=[0], deltas=[(0, 0, NUM_BLOCKS)]), bound)
    assert "outside" in fault(plan_of(buffers, [(0, 0, (1, 2))], bound=[0], deltas=[(0, 0, -1)]), bound)
    assert "disagree" in fault(plan_of(buffers, [(1, 7, (1, 2))], deltas=[(1, 1, 0), (1, 2, 1)]), [])
    assert "second tier" in fault(plan_of(buffers, [(0, 0, (1, 2))], bound=[0], deltas=[(0, 0, 3)], copies=1), bound)


def test_a_slot_that_changes_hands_leaves_no_blocks_behind() -> None:
    async def run() -> None:
        executor = executor_of(HashModel())
        await executor.launch(first_plan(executor), [binding_of([1, 2])]).tokens()
        again = plan_of(executor.new_buffers(), [(0, 0, (1, 2))], step=2, bound=[0])
        with pytest.raises(InvariantBroken, match="no block"):
            await executor.launch(again, [binding_of([1, 2])]).tokens()
        executor.close()

    asyncio.run(run())


def test_an_empty_cache_costs_no_memory_until_it_is_written() -> None:
    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * 4096

    before = resident()
    executor = executor_of(HashModel(), num_blocks=8_000_000)  # 9 numbers a token: 1.15 GB
    executor.close()
    assert resident() - before < 50 << 20


def test_the_executors_own_work_is_small() -> None:
    """Everything of a decode step but the model and the sampling, four rows with tables of a thousand blocks."""
    limits = BatchLimits(max_rows=4, max_tokens=8, max_blocks=1000, block_size=16)

    class Nothing(HashModel):
        def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
            return torch.zeros(len(inputs.token_ids), 1)

        def logits(self, hidden: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(hidden), VOCAB)

    async def run() -> float:
        executor = executor_of(Nothing(), limits, 4000)
        deltas = [(slot, at, slot * 1000 + at) for slot in range(4) for at in range(1000)]
        best = 1.0
        for start in range(0, 4000, 1000):
            slot = start // 1000
            table = deltas[start : start + 1000]
            plan = plan_of(executor.new_buffers(), [(slot, 15_000, (1,))], bound=[slot], deltas=table)
            await executor.launch(plan, [binding_of([1] * 15_001)]).tokens()
        for step in range(20):
            rows = [(slot, 15_001 + step, (ON_DEVICE,)) for slot in range(4)]
            plan = plan_of(executor.new_buffers(), rows, step=step)
            start_time = time.perf_counter()
            await executor.launch(plan, []).tokens()
            best = min(best, time.perf_counter() - start_time)
        executor.close()
        return best

    assert asyncio.run(run()) < 1e-2, "0.2 ms; work for each block of a context would take 30"
