"""A compiled scheduler in the hands of a test: shorter words for its calls, and a self-check after each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenspeed._core import Refusal, Scheduler, Stats
from tokenspeed.batch import BatchLimits, Finish, Int32Array, Outputs, Plan, PlanBuffers

LIMITS = BatchLimits(max_rows=4, max_tokens=16, max_blocks=16, block_size=4)


def int32(values: Sequence[int]) -> Int32Array:
    return np.array(values, dtype=np.int32)


class Driver:
    """A scheduler with two plan buffers, and shorter words for its calls."""

    def __init__(self, limits: BatchLimits = LIMITS, **sizes: Any) -> None:
        given: dict[str, Any] = {"num_blocks": 16, "max_model_len": 64, "max_queued": 8, "prefix_caching": True}
        self.core = Scheduler(limits=limits, hash_key=b"k" * 16, **(given | sizes))
        self.buffers = [PlanBuffers(limits) for _ in range(2)]
        self.now = 0.0

    def submit(self, request_id: int, prompt: Sequence[int], **wishes: Any) -> Refusal | None:
        given: dict[str, Any] = {"now": self.now, "max_tokens": None, "stop_ids": int32(wishes.pop("stop", []))}
        return self.core.submit(request_id, int32(prompt), **(given | wishes))

    def plan(self, seconds: float = 1.0) -> Plan | None:
        """The next plan, so much later than the one before."""
        self.now += seconds
        self.buffers.reverse()
        plan = self.core.plan(self.now, self.buffers[0])
        assert self.core.check() is None
        return plan

    def must_plan(self, seconds: float = 1.0) -> Plan:
        plan = self.plan(seconds)
        assert plan is not None
        return plan

    def commit(self, plan: Plan, *tokens: int, seconds: float = 0.0) -> Outputs:
        outputs = self.core.commit(plan.step, int32(tokens).reshape(-1, 1), int32([1] * len(tokens)), seconds)
        assert self.core.check() is None
        return outputs

    def step(self, *tokens: int) -> Outputs:
        return self.commit(self.must_plan(), *tokens)

    def run_out(self, token: int = 5) -> list[tuple[int, Finish]]:
        """Run to the end with one token for all; which requests ended, and why."""
        ended = []
        while self.core.has_work:
            plan = self.must_plan()
            outputs = self.commit(plan, *[token] * plan.num_samples)
            ended += finishes(outputs)
        return ended

    def land(self, *landed: int, failed: Sequence[int] = ()) -> None:
        self.core.land_copies(int32(landed), int32(failed))
        assert self.core.check() is None

    @property
    def stats(self) -> Stats:
        return self.core.stats()


def finishes(outputs: Outputs) -> list[tuple[int, Finish]]:
    pairs = zip(outputs.request_ids.tolist(), outputs.finish.tolist(), strict=True)
    return [(request_id, Finish(finish)) for request_id, finish in pairs if finish]


def prompt_of(length: int, start: int = 0) -> list[int]:
    return list(range(start, start + length))
