"""A profile of the device is read step by step."""

from __future__ import annotations

from tokenspeed.executor.kernel_times import Span, step_rows


def spans_of_a_step(at: float) -> list[Span]:
    """Two copies, two kernels that overlap, a pause of 4, one more."""
    return [
        Span(at, at + 1, "Memcpy HtoD (Pinned -> Device)"),
        Span(at + 1, at + 2, "Memcpy HtoD (Pinned -> Device)"),
        Span(at + 2, at + 10, "experts"),
        Span(at + 8, at + 12, "attention"),
        Span(at + 16, at + 20, "sample"),
    ]


def test_a_step_runs_from_its_copy_to_its_last_kernel_and_the_last_step_has_no_next() -> None:
    spans = [span for at in (0.0, 25.0, 47.0) for span in reversed(spans_of_a_step(at))]
    rows = step_rows(spans, 3).splitlines()[2:]
    assert rows == [
        "| 1 | 20.0 | 16.0 | 5 | 4.0 | 4.0 | 5.0 |",
        "| 2 | 20.0 | 16.0 | 5 | 4.0 | 4.0 | 2.0 |",
    ]


def test_only_the_last_steps_are_shown_and_none_where_nothing_ran() -> None:
    spans = [span for at in (0.0, 25.0, 47.0) for span in spans_of_a_step(at)]
    assert step_rows(spans, 1).splitlines()[2:] == ["| 1 | 20.0 | 16.0 | 5 | 4.0 | 4.0 | 2.0 |"]
    assert len(step_rows([], 3).splitlines()) == 2
