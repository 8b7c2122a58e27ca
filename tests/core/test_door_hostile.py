"""Calls of every method with arguments of any kind: each is served or is `Misuse`, and what is served goes on."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.driver import LIMITS, int32
from tokenspeed._core import Misuse, Policy, Scheduler
from tokenspeed.batch import Plan, PlanBuffers

INTEGERS = st.sampled_from(
    [0, 1, -1, 2**24 + 1, 2**31 - 1, 2**31, -(2**31) - 1, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**5000]
)
ARRAYS = st.builds(
    lambda shape, dtype, step: np.ones(shape, dtype)[..., ::step],
    st.sampled_from([(0,), (1,), (2,), (7,), (1, 1), (2, 1), (0, 1), (2, 3)]),
    st.sampled_from(["i4", "i8", "u4", "f4", "?", ">i4", "U1", "O", "M8[s]"]),
    st.sampled_from([1, 2, -1]),
)
ODDITIES = st.one_of(
    st.none(), st.booleans(), INTEGERS, st.floats(), st.text(max_size=2), st.binary(max_size=20), ARRAYS,
    st.lists(st.integers(-1, 3), max_size=2), st.builds(object), st.just(LIMITS),
    st.builds(PlanBuffers, st.sampled_from([LIMITS, replace(LIMITS, max_rows=2)])),
)  # fmt: skip

SMALL = st.integers(0, 4)
IDS = st.integers(0, 12)
TOKENS = st.binary(max_size=20).map(lambda content: int32([byte % 3 for byte in content]))
STOP_IDS = st.sampled_from([int32([]), int32([2])])
LATER = st.sampled_from([0.0, 0.001, 1.0, 100.0])


class Hostile:
    """A scheduler, and a caller that gives an odd argument now and then."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw
        self.random = random.Random(draw(st.integers(0, 2**32)))
        tiers, floor = draw(st.booleans()), draw(st.sampled_from([0.0, 70.0, 5e-324, 1e308]))
        self.core = Scheduler(
            num_blocks=8, limits=LIMITS, max_model_len=30, max_queued=4, prefix_caching=True, hash_key=bytes(16),
            num_host_blocks=6 if tiers else 0, policy=Policy(tps_floor=floor),
        )  # fmt: skip
        self.buffers = [PlanBuffers(LIMITS) for _ in range(3)]
        self.flights: list[Plan] = []
        self.tickets: list[int] = []
        self.now = 0.0

    def some(self, strategy: st.SearchStrategy[Any]) -> Any:
        """What makes sense, or one time in twenty anything."""
        return self.draw(ODDITIES if self.random.random() < 0.05 else strategy)

    def call(self, name: str) -> None:
        method = getattr(Hostile, name)
        with contextlib.suppress(Misuse):
            method(self)
        assert self.core.check() is None

    def submit(self) -> None:
        wishes: dict[str, Any] = {
            "max_tokens": st.integers(1, 9), "min_tokens": SMALL, "salt": st.binary(max_size=2),
            "priority": st.integers(-1, 1), "reuse_prefix": st.booleans(), "session": SMALL,
            "tps_floor": st.none() | st.floats(min_value=0, allow_infinity=False),
        }  # fmt: skip
        given = {name: self.some(strategy) for name, strategy in wishes.items()}
        now = self.some(st.just(self.now))
        self.core.submit(self.some(IDS), self.some(TOKENS), now=now, stop_ids=self.some(STOP_IDS), **given)

    def plan(self) -> None:
        now = self.some(LATER.map(lambda later: self.now + later))
        self.launch(now, self.some(st.just(self.buffers[0])))

    def launch(self, now: Any, buffers: Any) -> Plan | None:
        plan = self.core.plan(now, buffers)
        self.now = max(self.now, now)
        if plan is not None:
            self.flights.append(plan)
            self.tickets += plan.copies[:, 0].tolist()
            self.buffers.append(self.buffers.pop(0))
        return plan

    def commit(self) -> None:
        plan = self.flights[0] if self.flights else None
        count = plan.num_samples if plan else 1
        tokens = self.some(st.just(int32([self.random.choice((0, 1, 1, 2, -1)) for _ in range(count)]).reshape(-1, 1)))
        counts = self.some(st.just(int32([1] * count)))
        seconds = self.some(st.sampled_from([0.0, 5e-324, 0.01]))
        self.core.commit(self.some(st.just(plan.step if plan else 1)), tokens, counts, seconds)
        self.flights.pop(0)

    def land_copies(self) -> None:
        landed, failed = self.some(st.just(int32(self.tickets))), self.some(st.just(int32([])))
        self.core.land_copies(landed, failed)
        self.tickets = [t for t in self.tickets if t not in {*landed.tolist(), *failed.tolist()}]

    def end(self) -> None:
        self.core.abort(self.some(IDS))
        self.core.finish(self.some(IDS), self.some(SMALL))

    def look(self) -> None:
        assert self.core.holds(self.some(IDS)) in (True, False)
        assert self.core.cached_tokens(self.some(IDS)) >= 0
        assert len(self.core.tokens_of(self.some(IDS))[0]) > 0

    def predict(self) -> None:
        seconds = self.core.predict_seconds(self.some(st.lists(SMALL, max_size=2)), self.some(st.just([(1, 2)])))
        assert seconds is None or 0 <= seconds < math.inf

    def serve(self) -> None:
        """A caller who does everything right gets everything done, whatever came before."""
        for _ in range(1000):
            if not (self.core.has_work or self.tickets or self.flights):
                break
            plan = self.launch(self.now, self.buffers[0]) if len(self.flights) < 2 else None
            if plan is None and self.flights:
                landed = self.flights.pop(0)
                tokens = int32([1] * landed.num_samples).reshape(-1, 1)
                self.core.commit(landed.step, tokens, int32([1] * landed.num_samples), 0.01)
            self.core.land_copies(int32(self.tickets), int32([]))
            self.tickets = []
            self.now += 1.0
        stats = self.core.stats()
        assert (stats.running, stats.waiting, stats.draining, stats.blocks_used) == (0, 0, 0, 0), self.core.dump()
        assert self.core.check() is None and math.isfinite(self.core.retry_after)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_hostile_caller_hurts_nobody(data: st.DataObject) -> None:
    hostile = Hostile(data.draw)
    calls = ["submit"] * 4 + ["plan"] * 6 + ["commit"] * 6 + ["land_copies", "end", "look", "predict"]
    for name in hostile.random.choices(calls, k=60):
        hostile.call(name)
    hostile.serve()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_scheduler_of_anything_is_a_whole_one_or_none(data: st.DataObject) -> None:
    right: dict[str, Any] = {
        "num_blocks": 8, "limits": LIMITS, "max_model_len": 30, "max_queued": 4, "prefix_caching": True,
        "hash_key": bytes(16), "num_host_blocks": 0, "policy": Policy(),
    }  # fmt: skip
    fields = st.sampled_from(["max_rows", "max_tokens", "max_blocks", "block_size", "max_copies"])
    settled = st.sampled_from(["tps_floor", "floor_is_promise", "footprints", "max_queue_seconds"])
    oddities: dict[str, Any] = {
        "limits": st.builds(lambda name, value: replace(LIMITS, **{name: value}), fields, ODDITIES),
        "policy": st.builds(lambda name, value: replace(Policy(), **{name: value}), settled, ODDITIES),
    }
    names = data.draw(st.lists(st.sampled_from(list(right)), unique=True, max_size=3))
    given = right | {name: data.draw(ODDITIES | oddities.get(name, ODDITIES)) for name in names}
    try:
        core = Scheduler(**given)
    except Misuse:
        return
    assert core.check() is None and core.max_length >= 1
