"""The time of a step as the policy learns it, and how it shares that time: a virtual clock, one promise a test."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest

from tests.core.driver import int32
from tokenspeed._core import Policy, Scheduler
from tokenspeed.batch import BatchLimits, PlanBuffers


class Machine:
    """A device of known speed on a virtual clock: a + b (1 − 2^(−tokens / 8)) + c context + d prompt + e pairs."""

    COEFFICIENTS = (3e-3, 2e-3, 1e-8, 2e-5, 2e-10)

    def __init__(self, floor: float, noise: float = 0.05) -> None:
        limits = BatchLimits(max_rows=16, max_tokens=8192, max_blocks=2048, block_size=64)
        self.core = Scheduler(
            num_blocks=4096, limits=limits, max_model_len=131_072, max_queued=64, prefix_caching=True,
            hash_key=b"k" * 16, policy=Policy(tps_floor=floor),
        )  # fmt: skip
        self.buffers = PlanBuffers(limits)
        self.rng = np.random.default_rng(0)
        self.noise = noise
        self.measured = True
        self.now = 0.0
        self.tokens: dict[int, list[float]] = defaultdict(list)  # request → when it got each token
        self.chunks: list[int] = []  # prompt tokens of each step

    def submit(self, request_id: int, length: int, **wishes: Any) -> None:
        prompt = int32(self.rng.integers(0, 1000, length).tolist())
        given: dict[str, Any] = {"now": self.now, "max_tokens": None, "stop_ids": int32([])}
        assert self.core.submit(request_id, prompt, **(given | wishes)) is None

    def seconds(self, decode: list[int], prompts: list[tuple[int, int]]) -> float:
        a, b, c, d, e = self.COEFFICIENTS
        chunk = sum(count for _, count in prompts)
        pairs = sum(count * (computed + 0.5 * count) for computed, count in prompts)
        return a + b * (1 - 2 ** (-(len(decode) + chunk) / 8)) + c * sum(decode) + d * chunk + e * pairs

    def step(self) -> None:
        plan = self.core.plan(self.now, self.buffers)
        assert plan is not None
        rows = list(zip(plan.row_computed.tolist(), plan.row_new.tolist(), strict=True))
        seconds = self.seconds([computed for computed, _ in rows[: plan.num_decode]], rows[plan.num_decode :])
        seconds *= 1 + self.noise * self.rng.standard_normal()
        self.now += seconds
        self.chunks.append(sum(count for _, count in rows[plan.num_decode :]))
        tokens = np.full((plan.num_samples, 1), 5, np.int32)
        outputs = self.core.commit(plan.step, tokens, np.ones(plan.num_samples, np.int32), seconds * self.measured)
        for request_id in outputs.request_ids.tolist():
            self.tokens[request_id].append(self.now)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step()

    def until_first_token(self, request_id: int, most: int = 20_000) -> float:
        """Seconds until then."""
        start = self.now
        for _ in range(most):
            if self.tokens[request_id]:
                return self.now - start
            self.step()
        raise AssertionError("no token")

    def worst_second(self, request_id: int, start: float) -> int:
        """Of all sliding seconds since `start`, the fewest tokens that this stream got in one."""
        times = np.array(self.tokens[request_id])
        begins = times[(times >= start - 1) & (times <= self.now - 1)]
        return min(int(((times > begin) & (times <= begin + 1)).sum()) for begin in begins)


def test_the_model_learns_the_time_of_a_step_from_noisy_ones() -> None:
    m = Machine(floor=0.0)
    for i in range(12):
        m.submit(i, 500 + 1000 * i, max_tokens=40 + 20 * i)
        m.run(15)
    cases: list[tuple[list[int], list[tuple[int, int]]]] = [
        ([4000] * 8, []),
        ([1000], []),
        ([], [(0, 2048)]),
        ([8000] * 4, [(4096, 1024)]),
        ([], [(0, 8192)]),
    ]
    for decode, prompts in cases:
        assert m.core.predict_seconds(decode, prompts) == pytest.approx(m.seconds(decode, prompts), rel=0.1)
    assert m.core.seconds_of_prompt(2048) == pytest.approx(m.seconds([], [(0, 2048)]), rel=0.1)


def test_a_thousand_steps_that_are_all_alike_do_not_unteach_it() -> None:
    m = Machine(floor=0.0)
    for i in range(8):
        m.submit(i, 1000 + 500 * i)
    m.run(1000)
    decode = [3000 + 500 * i for i in range(8)]
    assert m.core.predict_seconds(decode, []) == pytest.approx(m.seconds(decode, []), rel=0.05)
    assert m.core.predict_seconds([], [(0, 4096)]) == pytest.approx(m.seconds([], [(0, 4096)]), rel=0.25)


def test_it_learns_what_is_constant_although_there_are_always_prompts() -> None:
    m = Machine(floor=70.0)
    for i in range(10):
        m.submit(i, 20_000)
    m.run(40)
    assert m.core.predict_seconds([20_000], []) == pytest.approx(m.seconds([20_000], []), rel=0.1)


def test_prompts_do_not_wait_for_a_model_that_learns_nothing() -> None:
    m = Machine(floor=70.0)
    m.submit(0, 3000)
    m.run(1)
    m.measured = False
    m.submit(1, 3000)
    m.run(10)
    assert m.tokens[1]


def test_a_pause_of_the_machine_is_not_learned() -> None:
    m = Machine(floor=0.0)
    m.submit(1, 1000)
    m.run(100)
    before = m.core.predict_seconds([1000], [])
    plan = m.core.plan(m.now, m.buffers)
    assert plan is not None and before is not None
    m.core.commit(plan.step, int32([5]).reshape(1, 1), int32([1]), 3.0)
    assert m.core.predict_seconds([1000], []) == pytest.approx(before, rel=0.05)


def with_streams(floor: float) -> Machine:
    """Eight streams of 5,000 tokens or so, at 4 ms a step, for a second or so."""
    m = Machine(floor)
    for i in range(8):
        m.submit(i, 3000 + 500 * i)
    m.run(250)
    return m


def test_streams_keep_their_floor_beside_a_long_prompt_which_advances_all_the_same() -> None:
    m = with_streams(floor=70.0)
    start = m.now
    m.submit(100, 100_000)
    m.chunks.clear()
    took = m.until_first_token(100)
    assert all(chunk == 0 or chunk >= 512 for chunk in m.chunks[:-1]), "a small part reads all weights for little"
    worst = min(m.worst_second(i, start) for i in range(8))
    assert worst >= 70 * 0.95
    alone = sum(m.seconds([], [(at, 8192)]) for at in range(0, 100_000, 8192))
    assert took < 2.5 * alone, "it gets most of the time that the floor leaves"


def test_a_lone_prompt_gets_the_whole_budget() -> None:
    m = with_streams(floor=70.0)
    for i in range(8):
        m.core.abort(i)
    m.submit(100, 50_000)
    m.chunks.clear()
    m.until_first_token(100)
    assert m.chunks == [8192] * 6 + [50_000 - 6 * 8192]


def test_without_a_floor_a_prompt_gets_what_decoding_leaves_of_the_budget() -> None:
    m = with_streams(floor=0.0)
    m.submit(100, 50_000)
    m.chunks.clear()
    m.until_first_token(100)
    assert m.chunks == [8184] * 6 + [50_000 - 6 * 8184]


def test_a_floor_that_leaves_time_for_the_whole_budget_leaves_the_whole_budget() -> None:
    m = with_streams(floor=10.0)
    m.submit(100, 50_000)
    m.chunks.clear()
    m.until_first_token(100)
    assert max(m.chunks) == 8184


def test_a_floor_that_nobody_could_keep_does_not_make_prompts_wait() -> None:
    m = with_streams(floor=10_000.0)
    m.submit(100, 50_000)
    m.chunks.clear()
    m.until_first_token(100)
    assert m.chunks[:6] == [8184] * 6


def test_streams_that_are_slower_than_their_floor_leave_prompts_a_part_of_the_time() -> None:
    m = with_streams(floor=270.0)  # a lone stream makes 310 tokens a second, eight 240
    m.submit(100, 50_000)
    prompt = sum(m.seconds([], [(at, 8192)]) for at in range(0, 50_000, 8192))
    assert m.until_first_token(100) < 5 * prompt
