"""One engine under a closed loop of sessions: the compiled control plane, a step-time model, a virtual clock."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from tokenspeed._core.types import Stats
from tokenspeed.batch import Finish, Int32Array, Outputs, Plan, PlanBuffers
from tokenspeed.errors import ConfigError, InvariantBroken
from tokenspeed.simulate.copies import NO_TICKETS, CopyEngines
from tokenspeed.simulate.door import Sizes, new_scheduler, submit
from tokenspeed.simulate.sessions import Conversation, Request


@dataclass(slots=True)
class TurnRecord:
    """One turn as a client sees it. `cached` and `ended` are −1 until it has ended; its tokens are in `StepLog`."""

    id: int
    is_first: bool
    submitted: float
    """When it was sent for the first time; refusals come after."""
    prompt: int
    ideal: int
    """Prompt tokens that a cache of unlimited size would have had."""
    output: int
    refusals: int = 0
    cached: int = -1
    ended: float = -1.0


@dataclass(slots=True)
class StepLog:
    """What every step gave: when it ended, its `OUTPUT_RECORD`s as bytes, the prompt tokens that it computed."""

    ends: list[float] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Live:
    """A session under way, with the request that it sends next or waits for."""

    conversation: Conversation
    request: Request
    turn: TurnRecord | None = None
    is_first: bool = True


class Engine:
    """Runs as many sessions at once as there are `starts`; one that ends is replaced by the next of `arrivals`.

    Each of the first sessions sends its first request at its start; one that replaces another does so after its
    own pause. Inputs that fall into a step take effect at its end. No step overlaps another. Times are in seconds.
    """

    def __init__(self, sizes: Sizes, arrivals: Iterator[Conversation], starts: list[float]) -> None:
        self._sizes = sizes
        self._core = new_scheduler(sizes)
        self._buffers = PlanBuffers(sizes.limits)
        self._computed = self._buffers.row_computed.reshape(-1, 1)
        self._new = self._buffers.row_new.reshape(-1, 1)
        self._copies = CopyEngines(sizes.block_bytes, sizes.host_gbps * 1e9)
        self._arrivals = arrivals
        self._counts = np.ones(sizes.max_rows, dtype=np.int32)
        self._events: list[tuple[float, int, Live]] = []
        self._running: dict[int, Live] = {}
        self._next_id = 1
        self.now = 0.0
        self.turns: list[TurnRecord] = []
        self.steps = StepLog()
        self.refusals: list[float] = []
        """When each refusal was given."""
        for start in starts:
            self._begin(start)

    @property
    def stats(self) -> Stats:
        """The control plane's counters."""
        return self._core.stats()

    def check(self) -> str | None:
        """The control plane's recount of itself: the first violation in words, or None."""
        return self._core.check()

    def run(self, until: float) -> None:
        """Go on to the first step boundary at or after the virtual second `until`."""
        core, buffers, copies, steps = self._core, self._buffers, self._copies, self.steps
        while self.now < until:
            self._send_due()
            if copies.next_landing() <= self.now:
                core.land_copies(copies.landed(self.now), NO_TICKETS)
            plan = core.plan(self.now, buffers)
            if plan is None:
                self._skip(until)
                continue
            if plan.num_copies:
                copies.start(plan.copies, self.now)
            seconds = self._sizes.model.seconds(plan) if plan.num_rows else 0.0
            self.now += seconds
            outputs = core.commit(plan.step, self._sample(plan), self._counts[: plan.num_samples], seconds)
            steps.ends.append(self.now)
            steps.records.append(outputs.records)
            steps.prompt_tokens.append(plan.num_tokens - plan.num_decode)
            if any(outputs.finish.tolist()):  # 2 µs less than numpy's any() for a few rows
                self._end_turns(outputs)

    def _sample(self, plan: Plan) -> Int32Array:
        """[S, 1]: each sampled token is its position."""
        positions = self._computed[: plan.num_rows] + self._new[: plan.num_rows]
        return positions if plan.num_samples == plan.num_rows else positions[plan.sample_rows]

    def _send_due(self) -> None:
        """Submit what was sent since the last boundary, each at its own time."""
        while self._events and self._events[0][0] <= self.now:
            at, _, live = heapq.heappop(self._events)
            self._send(live, at)

    def _send(self, live: Live, at: float) -> None:
        request = live.request
        if live.turn is None:
            ideal = request.reusable // self._sizes.block_size * self._sizes.block_size
            live.turn = TurnRecord(self._next_id, live.is_first, at, len(request.prompt), ideal, request.output)
            self._next_id += 1
            self.turns.append(live.turn)
        turn = live.turn
        if turn.prompt + turn.output > self._core.max_length:
            raise ConfigError(
                f"a turn of {turn.prompt} + {turn.output} tokens is longer than the {self._core.max_length} "
                "that the KV cache and the model's context allow"
            )
        retry = submit(
            self._core, turn.id, request.prompt, now=at, output=turn.output, session=live.conversation.serial
        )
        if retry is None:
            self._running[turn.id] = live
        else:
            turn.refusals += 1
            self.refusals.append(at)
            self._schedule(live, at + retry)

    def _skip(self, until: float) -> None:
        """Nothing can be computed now: on to whatever comes first."""
        sent = self._events[0][0] if self._events else math.inf
        coming = min(sent, self._copies.next_landing())
        if coming == math.inf:
            raise InvariantBroken(f"at {self.now:.3f} s the control plane plans nothing, and nothing is under way")
        self.now = min(coming, until)

    def _end_turns(self, outputs: Outputs) -> None:
        for request_id, _, _, _, finish, _, cached in outputs.entries():
            if finish == Finish.NONE:
                continue
            if finish != Finish.LENGTH:
                raise InvariantBroken(f"request {request_id} ended by {Finish(finish).name}, not by its length")
            live = self._running.pop(request_id)
            turn = live.turn
            assert turn is not None
            turn.cached = cached
            turn.ended = self.now
            following = live.conversation.next_request()
            if following is None:
                self._begin()
            else:
                live.request, live.turn, live.is_first = following, None, False
                self._schedule(live, self.now + following.think)

    def _begin(self, at: float | None = None) -> None:
        """The next session; its first request comes at `at`, or after its own pause."""
        conversation = next(self._arrivals)
        request = conversation.next_request()
        assert request is not None
        self._schedule(Live(conversation, request), self.now + request.think if at is None else at)

    def _schedule(self, live: Live, at: float) -> None:
        heapq.heappush(self._events, (at, live.conversation.serial, live))
