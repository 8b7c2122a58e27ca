"""What rank 0 does to its control plane another rank does too, and notices where it comes to anything else."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest

from tokenspeed._core.record import Call, recorded_through
from tokenspeed.batch import BatchLimits, JointBuffers, Plan, PlanBuffers, StepResult, StepTimes
from tokenspeed.engine import lockstep
from tokenspeed.engine.lockstep import Follower, Leader, LeadingExecutor
from tokenspeed.errors import InvariantBroken
from tokenspeed.executor.interface import Binding, Flight, Mask
from tokenspeed.request import SamplingParams

LIMITS = BatchLimits(max_rows=4, max_tokens=32, max_blocks=8, block_size=16)
NO_STOPS = np.zeros(0, dtype=np.int32)


class Landed:
    """A step that has landed with tokens that depend on its number alone, and on who is `wrong`."""

    masked: Sequence[int] = ()
    given: list[list[Mask]]

    def __init__(self, plan: Plan, wrong: int, *, crashes: bool) -> None:
        self.crashes = crashes
        tokens = (plan.step * 7 + np.arange(plan.num_samples, dtype=np.int32) + wrong)[:, None] % 50
        self.result = StepResult(
            plan.step, tokens.astype(np.int32), np.ones(len(tokens), dtype=np.int32), None, {}, StepTimes(0.0, 0.0)
        )

    def mask(self, masks: Sequence[Mask]) -> None:
        self.given.append(list(masks))

    async def tokens(self) -> StepResult:
        if self.crashes:
            raise Crash
        return self.result


class Crash(Exception):
    pass


class Device:
    """An executor that computes nothing; `bound` is how the requests that it was given sample."""

    num_blocks = 12

    def __init__(self, pools: int = 1, wrong_from: int = 1 << 30, *, crashes: bool = False) -> None:
        self.pools = pools
        self.wrong_from = wrong_from
        self.crashes = crashes
        self.bound: list[Binding] = []
        self.masks: list[list[Mask]] = []

    def launch(self, plan: Plan, bindings: Sequence[Binding]) -> Flight:
        self.bound += bindings
        flight = Landed(plan, int(plan.step >= self.wrong_from), crashes=self.crashes)
        flight.masked = [int(plan.row_slot[row]) for row in plan.sample_rows] if self.pools > 1 else ()
        flight.given = self.masks
        return flight

    def new_buffers(self) -> PlanBuffers:
        parts = [PlanBuffers(LIMITS) for _ in range(self.pools)]
        return JointBuffers(parts) if self.pools > 1 else parts[0]

    def close(self) -> None: ...


class Rank0:
    """A control plane and a device that are led; `frames` is what the others are told."""

    def __init__(self, pools: int = 1) -> None:
        self.frames: list[bytes] = []
        self.leader = Leader(self.frames.append, lambda error: None, debug=True, sends_masks=pools > 1)
        self.device = Device(pools)
        self.executor = LeadingExecutor(self.device, self.leader)
        self.core = recorded_through(
            self.leader, num_blocks=[12] * pools, limits=LIMITS, max_model_len=128, max_queued=8, prefix_caching=True,
            hash_key=bytes(range(16)),
        )  # fmt: skip
        self.flights: deque[Flight] = deque()
        self.buffers = deque(self.device.new_buffers() for _ in range(2))
        self.now = 0.0

    async def random_calls(self, seed: int, count: int) -> None:
        draw = random.Random(seed)
        for number in range(count):
            self.now += draw.random()
            match draw.choice(("submit", "step", "step", "step", "abort", "finish")):
                case "submit":
                    prompt = [draw.randrange(2) for _ in range(draw.randrange(1, 60))]
                    ids = np.array(prompt, dtype=np.int32)
                    self.core.submit(number, ids, now=self.now, max_tokens=draw.randrange(1, 40), stop_ids=NO_STOPS)
                case "step":
                    await self.step()
                case "abort":
                    self.core.abort(draw.randrange(number + 1))
                case "finish":
                    self.core.finish(draw.randrange(number + 1), 0)

    async def step(self) -> None:
        plan = self.core.plan(self.now, self.buffers[0]) if len(self.flights) < 2 else None
        if plan is not None:
            self.buffers.rotate()
            bindings = [
                Binding(SamplingParams(max_tokens=id + 1), *self.core.tokens_of(id), id, NO_STOPS, masked=True)
                for id in plan.bound_ids.tolist()
            ]
            self.flights.append(self.executor.launch(plan, bindings))
            if self.flights[-1].masked:
                masks = [np.array([slot, plan.step], dtype=np.int32) for slot in self.flights[-1].masked]
                self.flights[-1].mask([masks[0], *[None] * (len(masks) - 1)])
        elif self.flights:
            result = await self.flights.popleft().tokens()
            self.core.commit(result.step, result.tokens, result.num_tokens, 0.01)

    def told(self) -> list[bytes]:
        """All frames; the last one ends."""
        state = self.core.dump()
        self.core.submit(10**6, NO_STOPS, now=self.now, max_tokens=1, stop_ids=NO_STOPS)  # refused, and so told at once
        assert self.core.dump() == state
        self.core.close()
        assert self.frames.pop() == b""
        return self.frames


def listed(masks: list[list[Mask]]) -> list[list[list[int] | None]]:
    return [[None if mask is None else mask.tolist() for mask in step] for step in masks]


async def followed(frames: list[bytes], device: Device) -> Follower:
    follower = Follower(device, debug=True)
    for frame in frames:
        await follower.follow(frame)
    return follower


@pytest.mark.parametrize("pools", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_random_calls_lead_another_rank_to_the_same_state(seed: int, pools: int) -> None:
    async def run() -> None:
        rank0, device = Rank0(pools), Device(pools)
        await rank0.random_calls(seed, 400)
        state = rank0.core.dump()
        follower = await followed(rank0.told(), device)
        assert follower.core.dump() == state
        assert rank0.core.stats().generated_tokens > 100
        given, told = rank0.device.bound, device.bound
        assert [(each.params, each.seed) for each in told] == [(each.params, each.seed) for each in given]
        assert len(told) > 10 and {each.masked for each in told} == {pools > 1}, "masks are for ranks that decide"
        assert listed(device.masks) == listed(rank0.device.masks)
        assert len(device.masks) > 10 or pools == 1

    asyncio.run(run())


def test_other_tokens_end_a_rank_and_name_the_step() -> None:
    async def run() -> None:
        rank0 = Rank0()
        await rank0.random_calls(1, 200)
        with pytest.raises(InvariantBroken, match="step 5: rank 0 has the tokens"):
            await followed(rank0.told(), Device(wrong_from=5))

    asyncio.run(run())


def test_another_plan_ends_a_rank_and_names_the_step() -> None:
    async def run() -> None:
        rank0 = Rank0()
        await rank0.random_calls(1, 60)
        frames = rank0.told()
        at, frame = next((i, f) for i, f in enumerate(frames) if lockstep.decoded(f).step == 3)
        there = lockstep.decoded(frame)
        calls = [Call.of(call.method, call.args, call.kwargs) for call in there.calls]
        wrong = lockstep.Frame(calls, there.step, there.bound, None, bytes(16))
        frames[at] = lockstep.encoded(wrong)
        with pytest.raises(InvariantBroken, match="step 3: this rank's plan is not rank 0's"):
            await followed(frames, Device())
        frames[at] = lockstep.encoded(lockstep.Frame(calls, 4, there.bound))
        with pytest.raises(InvariantBroken, match="rank 0 launches step 4, this rank plans 3"):
            await followed(frames, Device())

    asyncio.run(run())


def test_what_a_step_raises_is_known_before_rank_0_says_that_it_has_landed() -> None:
    async def run() -> None:
        rank0 = Rank0()
        rank0.core.submit(1, np.ones(4, dtype=np.int32), now=0.0, max_tokens=9, stop_ids=NO_STOPS)
        await rank0.step()
        follower = await followed(rank0.told(), Device(crashes=True))
        with pytest.raises(Crash):
            await asyncio.wait_for(follower.broken, 20)

    asyncio.run(run())


def test_a_step_that_does_not_land_is_named_after_a_while_and_an_idle_engine_is_not_stuck() -> None:
    async def run() -> None:
        rank0 = Rank0()
        rank0.core.submit(1, np.ones(4, dtype=np.int32), now=0.0, max_tokens=9, stop_ids=NO_STOPS)
        time.sleep(0.05)
        assert rank0.leader.stuck(0.02) is None
        await rank0.step()
        assert rank0.leader.stuck(30.0) is None
        time.sleep(0.05)
        assert rank0.leader.stuck(0.02) == 1
        rank0.flights.append(rank0.flights[0])
        result = await rank0.flights[0].tokens()
        rank0.core.commit(result.step, result.tokens, result.num_tokens, 0.01)
        assert rank0.leader.stuck(0.0) is None
        rank0.core.close()

    asyncio.run(run())


def test_a_rank_that_cannot_be_told_is_lost_also_while_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lockstep, "KEEP_ALIVE_SECONDS", 0.05)
    lost = threading.Event()
    sent: list[bytes] = []

    def send(data: bytes) -> None:
        sent.append(data)
        if len(sent) == 3:
            raise EOFError("rank 1 is gone")

    Leader(send, lambda error: lost.set(), debug=False)
    assert lost.wait(20)
    assert all(lockstep.decoded(data) == lockstep.Frame([]) for data in sent)
