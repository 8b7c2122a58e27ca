"""The step loop with the real control plane and a scripted device: order, overlap, aborts, failures."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from tokenspeed._core import Policy, Refusal
from tokenspeed._core.scheduler import Scheduler
from tokenspeed.batch import NOT_FINITE, BatchLimits, Finish, Plan, PlanBuffers, StepResult, StepTimes
from tokenspeed.engine.messages import ChoiceTokens, Submit
from tokenspeed.engine.step_loop import StepLoop
from tokenspeed.executor.interface import Binding, Mask
from tokenspeed.request import SamplingParams

LIMITS = BatchLimits(max_rows=8, max_tokens=64, max_blocks=16, block_size=16)
NUM_BLOCKS = 64
EOS = 9


class ScriptedFlight:
    masked = ()

    def mask(self, masks: Sequence[Mask]) -> None:
        assert not masks

    def __init__(self, device: ScriptedDevice, plan: Plan) -> None:
        self._device = device
        self._plan = plan

    async def tokens(self) -> StepResult:
        await asyncio.sleep(self._device.step_seconds)
        if self._device.fail_at == self._plan.step:
            raise RuntimeError("the device caught fire")
        self._device.in_flight -= 1
        samples = [self._device.token(self._plan, int(row)) for row in self._plan.sample_rows]
        return StepResult(
            self._plan.step,
            np.array(samples, dtype=np.int32).reshape(-1, 1),
            np.ones(len(samples), dtype=np.int32),
            None,
            {},
            StepTimes(self._device.step_seconds + self._device.seconds_a_row * self._plan.num_rows, 0.0),
        )


class ScriptedDevice:
    """Samples token 100 + slot; `poison` slots give NaN, `eos_at` ends everything at that position."""

    num_blocks = NUM_BLOCKS

    def __init__(self) -> None:
        self.step_seconds = 0.001
        self.seconds_a_row = 0.0  # that it says a row takes besides
        self.fail_at = -1
        self.in_flight = 0
        self.deepest = 0
        self.launched: list[int] = []
        self.poison: set[int] = set()
        self.eos_at = 10**9

    def token(self, plan: Plan, row: int) -> int:
        if int(plan.row_slot[row]) in self.poison:
            return NOT_FINITE
        return EOS if plan.row_computed[row] + plan.row_new[row] >= self.eos_at else 100 + int(plan.row_slot[row])

    def launch(self, plan: Plan, bindings: Sequence[Binding]) -> ScriptedFlight:
        assert len(bindings) == plan.num_bound
        self.launched.append(plan.num_rows)
        self.in_flight += 1
        self.deepest = max(self.deepest, self.in_flight)
        return ScriptedFlight(self, plan)

    def new_buffers(self) -> PlanBuffers:
        return PlanBuffers(LIMITS)

    def close(self) -> None:
        return None


class Bench:
    """A loop running in the background with what it published."""

    def __init__(
        self, overlap: int, max_queued: int = 100, policy: Policy = Policy(), kind: type[Scheduler] = Scheduler  # noqa: B008
    ) -> None:
        self.device = ScriptedDevice()
        self.core = kind(
            num_blocks=NUM_BLOCKS,
            limits=LIMITS,
            max_model_len=256,
            max_queued=max_queued,
            prefix_caching=True,
            hash_key=bytes(16),
            policy=policy,
        )
        self.published: list[ChoiceTokens] = []
        self.loop = StepLoop(
            self.core,
            self.device,
            overlap=overlap,
            vocab_size=1000,
            eos_token_ids=(EOS,),
            publish=self.published.extend,
            debug=True,
        )

    def submit(
        self, request_id: int, length: int = 20, max_tokens: int = 10, session: int = 0, tps_floor: float | None = None
    ) -> Refusal | None:
        prompt = (np.arange(length, dtype=np.int32) + 10).tobytes()
        params = msgspec.Raw(msgspec.msgpack.encode(SamplingParams(max_tokens=max_tokens)))
        return self.loop.submit(
            Submit(id=request_id, prompt=prompt, params=params, seed=1, session=session, tps_floor=tps_floor)
        )

    async def drained(self) -> None:
        for _ in range(2000):
            stats = self.core.stats()
            if stats.running == stats.waiting == stats.blocks_used == 0:
                return
            await asyncio.sleep(0.001)
        raise AssertionError(self.core.dump())

    def tokens(self, request_id: int) -> list[int]:
        return [token for item in self.published if item.id == request_id for token in item.token_ids]

    def finish(self, request_id: int) -> int:
        return [item.finish for item in self.published if item.id == request_id][-1]


async def ended(bench: Bench, task: asyncio.Task[None]) -> None:
    bench.loop.stop()
    await task


@pytest.mark.parametrize("overlap", [0, 1])
def test_requests_are_served_to_their_length_and_nothing_is_held_afterwards(overlap: int) -> None:
    async def run() -> None:
        bench = Bench(overlap)
        task = asyncio.create_task(bench.loop.run())
        for request_id in range(1, 13):
            assert bench.submit(request_id, length=20 + request_id) is None
        await bench.drained()
        for request_id in range(1, 13):
            assert len(bench.tokens(request_id)) == 10
            assert bench.finish(request_id) == Finish.LENGTH
        assert bench.device.deepest == overlap + 1
        await ended(bench, task)

    asyncio.run(run())


@pytest.mark.parametrize("overlap", [0, 1])
def test_end_of_sequence_ends_a_request_and_the_step_in_flight_adds_nothing(overlap: int) -> None:
    async def run() -> None:
        bench = Bench(overlap)
        bench.device.eos_at = 24
        task = asyncio.create_task(bench.loop.run())
        bench.submit(1, length=20)
        await bench.drained()
        assert bench.tokens(1)[-1] == EOS and bench.tokens(1).count(EOS) == 1
        assert bench.finish(1) == Finish.STOP
        await ended(bench, task)

    asyncio.run(run())


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
def test_an_abort_frees_within_two_steps_from_every_state(overlap: int, steps: int) -> None:
    async def run() -> None:
        bench = Bench(overlap)
        task = asyncio.create_task(bench.loop.run())
        bench.submit(1, length=150, max_tokens=50)
        bench.submit(2, length=30, max_tokens=100)
        while len(bench.device.launched) < steps:
            await asyncio.sleep(0)
        at = len(bench.device.launched)
        bench.loop.abort(1)
        bench.loop.abort(1)
        while bench.core.stats().running + bench.core.stats().waiting > 1:
            await asyncio.sleep(0)
        # Blocks of request 2 alone: nothing of request 1 is left after the steps that were in flight.
        while len(bench.device.launched) < at + 2:
            await asyncio.sleep(0)
        await asyncio.sleep(0.002)
        assert bench.core.stats().blocks_used <= -(-(30 + len(bench.tokens(2)) + 3) // 16)
        bench.loop.abort(2)
        await bench.drained()
        await ended(bench, task)

    asyncio.run(run())


def test_a_row_that_is_not_finite_ends_alone() -> None:
    async def run() -> None:
        bench = Bench(1)
        task = asyncio.create_task(bench.loop.run())
        bench.device.poison = {0}
        for request_id in (1, 2, 3):
            bench.submit(request_id)
        await bench.drained()
        ends = [bench.finish(request_id) for request_id in (1, 2, 3)]
        assert sorted(ends) == [Finish.LENGTH, Finish.LENGTH, Finish.ERROR]
        await ended(bench, task)

    asyncio.run(run())


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def run() -> None:
        bench = Bench(1, max_queued=3)
        assert [bench.submit(request_id) for request_id in range(1, 6)] == [None] * 3 + [Refusal.QUEUE_FULL] * 2
        assert bench.loop.retry_after() >= 1
        task = asyncio.create_task(bench.loop.run())
        await bench.drained()
        assert bench.submit(9) is None
        await bench.drained()
        await ended(bench, task)

    asyncio.run(run())


def test_a_floor_that_the_measured_steps_do_not_allow_is_refused() -> None:
    async def run() -> None:
        bench = Bench(1, policy=Policy(tps_floor=10_000.0, floor_is_promise=True))
        task = asyncio.create_task(bench.loop.run())
        assert bench.submit(1, max_tokens=40) is None  # nothing is measured yet
        await bench.drained()
        assert bench.submit(2) == Refusal.FLOOR_OUT_OF_REACH
        assert bench.submit(3, tps_floor=0.0) is None
        assert bench.submit(4, tps_floor=1.0) is None
        assert bench.submit(5, tps_floor=5_000.0) == Refusal.FLOOR_OUT_OF_REACH
        assert bench.loop.stats().refusals == {"floor_out_of_reach": 2}
        await bench.drained()
        await ended(bench, task)

    asyncio.run(run())


def test_a_floor_that_only_others_are_in_the_way_of_is_refused_for_now() -> None:
    async def run() -> None:
        bench = Bench(1)
        bench.device.seconds_a_row = 0.01
        task = asyncio.create_task(bench.loop.run())
        for request_id in range(1, 5):
            assert bench.submit(request_id, length=15 * request_id, max_tokens=20) is None
        await bench.drained()
        assert bench.submit(5, max_tokens=200, tps_floor=70.0) is None
        assert bench.submit(6, tps_floor=70.0) == Refusal.FLOOR
        assert bench.loop.retry_after() >= 1
        bench.loop.abort(5)
        await bench.drained()
        assert bench.submit(7, tps_floor=70.0) is None
        await bench.drained()
        await ended(bench, task)

    asyncio.run(run())


def test_a_session_that_does_not_fit_waits_while_resident_ones_go_on() -> None:
    async def run() -> None:
        bench = Bench(1, policy=Policy(max_queue_seconds=300.0))
        task = asyncio.create_task(bench.loop.run())
        for number in range(1, 7):  # 10 blocks each, and 58 of 64 are for sessions: 5 of them fit
            assert bench.submit(number, length=150, max_tokens=40, session=number) is None
            for _ in range(1000):
                if bench.loop.stats().sessions_resident >= min(number, 5):
                    break
                await asyncio.sleep(0)
        assert (bench.loop.stats().sessions_resident, bench.loop.stats().sessions_waiting) == (5, 1)
        assert bench.submit(101, length=150, session=1) is None  # another turn of one that is resident
        assert bench.loop.stats().sessions_waiting == 1
        await bench.drained()
        await ended(bench, task)

    asyncio.run(run())


def test_a_finish_from_outside_keeps_only_its_tokens() -> None:
    async def run() -> None:
        bench = Bench(1)
        task = asyncio.create_task(bench.loop.run())
        bench.submit(1, max_tokens=200)
        while len(bench.tokens(1)) < 5:
            await asyncio.sleep(0)
        bench.loop.finish(1, 4)
        seen = len(bench.tokens(1))
        await bench.drained()
        assert len(bench.tokens(1)) == seen
        await ended(bench, task)

    asyncio.run(run())


def test_a_failing_step_ends_the_loop_with_its_own_exception() -> None:
    async def run() -> None:
        bench = Bench(1)
        bench.device.fail_at = 3
        bench.submit(1)
        with pytest.raises(RuntimeError, match="caught fire"):
            await bench.loop.run()

    asyncio.run(run())
