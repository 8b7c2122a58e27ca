"""A closed loop of sessions over one engine or several, from a seed to the figures of a window."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tokenspeed.simulate.door import Sizes
from tokenspeed.simulate.engine import Engine
from tokenspeed.simulate.report import Figures, Sample, Window, figures, sample
from tokenspeed.simulate.sessions import Conversation, FreshIds, Session

REPORTED_FLOOR = 70.0
"""Tokens a second of a stream that the figures are held against where the policy has no floor."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is replayed: sessions after the rules, how they start, what is measured. Seconds are virtual."""

    sessions: list[Session]
    seed: int = 0
    warm_up: float = 120.0
    window: float = 600.0
    ramp: float = 60.0
    """The first sessions send their first request at a random moment of this long."""
    shared_system: bool = False


def arrivals(load: Load, instance: int, instances: int) -> Iterator[Conversation]:
    """The sessions of one engine without end: every pass over the list is shuffled by the seed and dealt round.

    Each starts at a random turn of it. A session that comes again in a later pass shares nothing with before.
    """
    random = np.random.default_rng([load.seed, 1])
    fresh = FreshIds()
    serial = 0
    while True:
        for index in random.permutation(len(load.sessions)).tolist():
            session = load.sessions[index]
            start = int(random.integers(len(session.turns)))
            serial += 1
            if serial % instances == instance:
                yield Conversation(session, start, fresh, serial=serial, shared_system=load.shared_system)


def replay(load: Load, sizes: Sizes, *, sessions: int, instances: int = 1) -> Figures:
    """Run `sessions` sessions at once over `instances` engines, a session always on the same one.

    Engines share nothing, so they run one after the other. The CPU time is that of this thread, in seconds.
    """
    floor = sizes.policy.tps_floor or REPORTED_FLOOR
    window = Window(load.warm_up, load.warm_up + load.window)
    starts = np.random.default_rng([load.seed, 2]).uniform(0.0, load.ramp, sessions)
    samples: list[Sample] = []
    began = time.thread_time()
    for instance in range(instances):
        engine = Engine(sizes, arrivals(load, instance, instances), starts[instance::instances].tolist())
        engine.run(window.begin)
        before = engine.stats.preemptions
        engine.run(window.end)
        preemptions = engine.stats.preemptions - before
        samples.append(sample(engine, window, floor=floor, preemptions=preemptions))
    cpu = time.thread_time() - began
    return figures(samples, window, sessions=sessions, floor=floor, virtual_s=window.end, cpu_s=cpu)
