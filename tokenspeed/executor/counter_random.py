"""Random numbers that are a function of (seed, position), never of a generator's state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tokenspeed.batch import Int64Array

UInt64Array = npt.NDArray[np.uint64]

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
FIRST_FACTOR, SECOND_FACTOR = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def uniform(seed: Int64Array, position: Int64Array) -> npt.NDArray[np.float64]:
    """The uniform number in [0, 1) of each (seed, position): int64 [N] and int64 [N] to float64 [N].

    The (position + 1)-th output of SplitMix64 started at mix(seed), its upper 53 bits (Steele, Lea and
    Flood, "Fast splittable pseudorandom number generators", 2014; constants of Stafford's variant 13).
    Mixing the seed first keeps the streams of neighbouring seeds apart.
    """
    state = _mix(seed.astype(np.uint64)) + (position.astype(np.uint64) + np.uint64(1)) * GOLDEN_GAMMA
    return (_mix(state) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: UInt64Array) -> UInt64Array:
    z = (z ^ (z >> np.uint64(30))) * FIRST_FACTOR
    z = (z ^ (z >> np.uint64(27))) * SECOND_FACTOR
    return z ^ (z >> np.uint64(31))
