"""The figures of a window, against small numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tokenspeed.simulate.report import Window, percentile, sliding_seconds


def test_percentiles_are_values_that_occurred() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.0
    assert percentile([4.0, 1.0, 3.0, 2.0], 95) == 4.0
    assert percentile([], 50) == 0.0


def test_a_window_holds_its_end_but_not_its_beginning() -> None:
    window = Window(1.0, 3.0)
    assert (window.holds(1.0), window.holds(3.0), window.seconds) == (False, True, 2.0)


def test_a_sliding_second_counts_the_tokens_after_its_beginning() -> None:
    times = np.array([0.0, 0.5, 1.0, 1.25, 2.5])
    tokens, seconds = sliding_seconds(times)
    # (0, 1] has two and is the latest until 1.5; (0.5, 1.5] two, until 2; (1, 2] one; (1.25, 2.25] none, to the end.
    assert tokens.tolist() == [2, 2, 1, 0] and seconds.tolist() == [1.5, 0.5, 0.25, 0.25]


def test_a_stream_of_less_than_a_second_is_one_piece() -> None:
    tokens, seconds = sliding_seconds(np.array([2.0, 2.1, 2.2, 2.4]))
    assert tokens.tolist() == pytest.approx([7.5]) and seconds.tolist() == pytest.approx([0.4])


def test_a_steady_stream_is_at_its_rate_all_the_time() -> None:
    tokens, seconds = sliding_seconds(np.arange(1_000) / 64.0)
    assert set(tokens.tolist()) == {64.0} and seconds.sum() == pytest.approx(999 / 64.0)
