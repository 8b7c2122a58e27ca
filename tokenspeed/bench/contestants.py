"""A control plane as the benchmark sees it, and ours in that shape.

`step` plans and commits; what the device would do between the two is not timed, nor is making its answer. Every
duration is in nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter_ns
from typing import Protocol

import numpy as np

from tokenspeed._core.scheduler import Scheduler
from tokenspeed.batch import BatchLimits, Int32Array, PlanBuffers

BLOCK_SIZE = 64
TOKEN = 7
"""What every sample is; the control plane does not care."""
STEP_SECONDS = 0.01
"""How long a step is said to have taken, so that the cost of learning step times is in the figures."""


class BenchError(Exception):
    """A workload did not come about as described; the message is one line."""


@dataclass(frozen=True)
class Sizes:
    """What a workload needs: KV blocks of 64 tokens, rows and tokens of a step, requests that may wait."""

    num_blocks: int
    max_rows: int
    max_tokens: int = 8192
    max_queued: int = 512
    max_len: int = 131_072


class Contestant(Protocol):
    """One control plane with its own pool of blocks."""

    def submit(self, request_id: int, prompt: Int32Array, max_tokens: int) -> int:
        """Queue a request, which must be accepted; how long that took."""

    def step(self) -> tuple[int, int]:
        """Plan one step, and commit it with one token for each row that samples; how long each took."""

    def finish(self, request_id: int) -> None:
        """End a request that runs; its full blocks stay in the prefix cache."""

    def rows(self) -> int:
        """Rows of the last step."""

    def waiting(self) -> int:
        """Requests that wait to be admitted."""

    def cached_tokens(self, request_id: int) -> int:
        """Prompt tokens of a running request that were prefix hits."""


class Ours:
    """`tokenspeed._core.scheduler`."""

    def __init__(self, sizes: Sizes) -> None:
        limits = BatchLimits(
            max_rows=sizes.max_rows,
            max_tokens=sizes.max_tokens,
            max_blocks=sizes.max_len // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
        )
        self.core = Scheduler(
            num_blocks=sizes.num_blocks,
            limits=limits,
            max_model_len=sizes.max_len,
            max_queued=sizes.max_queued,
            prefix_caching=True,
            hash_key=bytes(range(16)),
        )
        self.buffers = (PlanBuffers(limits), PlanBuffers(limits))
        self.tokens = np.full((sizes.max_rows, 1), TOKEN, np.int32)
        self.counts = np.ones(sizes.max_rows, np.int32)
        self._no_stops = np.zeros(0, np.int32)
        self._now = 0.0
        self._rows = 0
        self._turn = 0

    def submit(self, request_id: int, prompt: Int32Array, max_tokens: int) -> int:
        start = perf_counter_ns()
        refusal = self.core.submit(request_id, prompt, now=self._now, max_tokens=max_tokens, stop_ids=self._no_stops)
        end = perf_counter_ns()
        if refusal is not None:
            raise BenchError(f"request {request_id} was refused: {refusal.name}")
        return end - start

    def step(self) -> tuple[int, int]:
        self._now += STEP_SECONDS
        self._turn = 1 - self._turn
        buffers = self.buffers[self._turn]
        start = perf_counter_ns()
        plan = self.core.plan(self._now, buffers)
        planned = perf_counter_ns()
        if plan is None:
            raise BenchError("there was nothing to plan")
        self._rows = plan.num_rows
        tokens, counts = self.tokens[: plan.num_samples], self.counts[: plan.num_samples]
        landed = perf_counter_ns()
        self.core.commit(plan.step, tokens, counts, STEP_SECONDS)
        return planned - start, perf_counter_ns() - landed

    def finish(self, request_id: int) -> None:
        if not self.core.abort(request_id):
            raise BenchError(f"request {request_id} was not running")

    def rows(self) -> int:
        return self._rows

    def waiting(self) -> int:
        return self.core.stats().waiting

    def cached_tokens(self, request_id: int) -> int:
        return self.core.cached_tokens(request_id)
