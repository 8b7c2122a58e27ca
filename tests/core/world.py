"""The sizes, the policy and the habits of the callers in one run of the fuzz."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tokenspeed._core import Policy
from tokenspeed.batch import BatchLimits

DEFAULT_POLICY = Policy()


@dataclass(frozen=True)
class World:
    """The sizes of one run, small, so that shortage is the rule."""

    num_blocks: int
    limits: BatchLimits
    max_model_len: int
    max_queued: int
    prefix_caching: bool
    overlap: int
    not_finite: float
    ends: float  # chance that a call is an abort, and that it is a finish
    hungry: bool  # requests are short and go on to their greatest length, so that they starve each other
    num_host_blocks: int = 0
    policy: Policy = DEFAULT_POLICY
    names: float = 0.0  # chance that a request names its session, and that it names a floor
    returns: float = 0.4  # chance that a request goes on where another has ended
    reuses: float = 1.0  # chance that it may use the prefix cache

    @staticmethod
    def draw(rng: np.random.Generator) -> World:
        block_size = int(rng.integers(1, 5))
        rows = int(rng.integers(1, 9))
        tiers = rng.random() < 0.6
        return World(
            num_blocks=int(rng.integers(2, 10)) if rng.random() < 0.3 else int(rng.integers(8, 32)),
            limits=BatchLimits(
                max_rows=rows,
                max_tokens=rows + int(rng.integers(0, 20)),
                max_blocks=int(rng.integers(2, 7)) if rng.random() < 0.3 else int(rng.integers(6, 24)),
                block_size=block_size,
                max_copies=int(rng.integers(1, 12)),
            ),
            max_model_len=int(rng.integers(4, 100)),
            max_queued=int(rng.integers(1, 12)),
            prefix_caching=bool(rng.random() < 0.9),
            overlap=int(rng.integers(0, 2)),
            not_finite=float(rng.choice([0.0, 0.01, 0.05, 0.15])),
            ends=float(rng.choice([0.002, 0.03])),
            hungry=bool(rng.random() < 0.5),
            num_host_blocks=(int(rng.integers(1, 20)) if rng.random() < 0.5 else 80) if tiers else 0,
            policy=Policy(
                tps_floor=float(rng.integers(1, 100)) if rng.random() < 0.5 else 0.0,
                floor_is_promise=bool(rng.random() < 0.2),
                footprints=bool(rng.random() < 0.5),
                max_queue_seconds=float(rng.choice([0.0, 1.0, 300.0])),
            ),
            names=float(rng.choice([0.0, 0.3])),
            returns=float(rng.choice([0.4, 0.85])),
            reuses=float(rng.choice([1.0, 0.9, 0.7])),
        )
