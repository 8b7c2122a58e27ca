"""Two queues of copies with a bandwidth each."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokenspeed.simulate.copies import CopyEngines


def rows(*copies: tuple[int, int]) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    return np.array([(ticket, direction, 0, 0) for ticket, direction in copies], dtype=np.int32)


def test_what_a_step_starts_lands_together_and_after_what_was_before_it() -> None:
    engines = CopyEngines(block_bytes=100.0, bytes_per_second=50.0)
    engines.start(rows((1, 0), (2, 0)), now=10.0)
    engines.start(rows((3, 0)), now=10.5)
    assert engines.next_landing() == pytest.approx(14.0)
    assert engines.landed(13.9).tolist() == []
    assert engines.landed(14.0).tolist() == [1, 2] and engines.next_landing() == pytest.approx(16.0)
    assert engines.landed(20.0).tolist() == [3] and engines.next_landing() == math.inf


def test_the_directions_do_not_wait_for_each_other() -> None:
    engines = CopyEngines(block_bytes=100.0, bytes_per_second=50.0)
    engines.start(rows((1, 0), (2, 1), (3, 0)), now=0.0)
    assert engines.landed(2.0).tolist() == [2]
    engines.start(rows((4, 1)), now=3.0)
    assert engines.landed(4.9).tolist() == [1, 3] and engines.landed(5.0).tolist() == [4]
