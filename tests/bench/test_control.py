"""The control-plane benchmark measures the situations that it names, and judges them by its rules."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tokenspeed.bench import allocations, control, upstream
from tokenspeed.bench.contestants import BenchError, Ours, Sizes
from tokenspeed.bench.control import ROWS, Measured, Row

LIGHT = [row for row in ROWS if "65K" not in row.name and "60K" not in row.name]


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    control.add_flags(parser)
    return parser.parse_args(["--repeats", "1", "--seconds", "0.001", *flags])


def named(beginning: str) -> Row:
    return next(row for row in ROWS if row.name.startswith(beginning))


@pytest.mark.parametrize("row", LIGHT, ids=lambda row: row.name)
def test_a_situation_comes_about_and_lasts(row: Row) -> None:
    measure = row.prepare(Ours(row.sizes))
    times = [measure() for _ in range(20)]
    assert all(first > 0 and second > 0 for first, second in times)


@pytest.mark.skipif(upstream.installed() is None, reason="tokenspeed-scheduler is not installed")
@pytest.mark.parametrize("row", LIGHT, ids=lambda row: row.name)
def test_upstreams_scheduler_meets_the_same_situations(row: Row) -> None:
    measure = row.prepare(upstream.Upstream(row.sizes))
    assert all(min(measure()) > 0 for _ in range(3))


def test_a_backlog_that_fits_is_noticed() -> None:
    with pytest.raises(BenchError, match="not 2 and 200"):
        named("2 decoding").prepare(Ours(Sizes(20_000, 256)))()


def test_a_prompt_that_is_not_cached_is_noticed() -> None:
    row = named("admit 50,000")
    ours = Ours(replace(row.sizes, num_blocks=800))
    measure = row.prepare(ours)
    control.Admissions(ours, control.prompt_of(0, 0), 40_000)()
    with pytest.raises(BenchError, match="were cached, not 49152"):
        measure()


def judged(*times: tuple[str, float, float]) -> Sequence[str]:
    measured = [(named(name), Measured([ours]), Measured([theirs])) for name, ours, theirs in times]
    return control.misses(measured)


def test_a_row_is_judged_by_its_ratio_to_upstream_not_by_its_time() -> None:
    assert judged(("64", 200, 1500)) == []
    assert judged(("64", 19, 140)) == ["64 decoding"]


def test_a_row_without_a_ratio_is_judged_by_the_slowness_of_the_machine() -> None:
    assert judged(("64", 30, 2 * 149), ("admit 8K", 199, 1)) == []
    assert judged(("64", 30, 2 * 149), ("admit 8K", 201, 1)) == ["admit 8K, 60K blocks cached"]


def test_without_upstream_times_are_shown_and_not_judged(capsys: pytest.CaptureFixture[str]) -> None:
    assert control.main(options("--rows", "1 decoding", "--no-upstream", "--check")) == 0
    shown = capsys.readouterr().out
    assert "1 decoding" in shown and "64 decoding" not in shown and "not judged" in shown


@pytest.mark.parametrize(("flags", "status"), [([], 0), (["--check"], 1)])
def test_only_a_check_fails_on_a_missed_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], status: int
) -> None:
    monkeypatch.setattr(upstream, "installed", lambda: "of our own")
    monkeypatch.setattr(upstream, "Upstream", Ours)
    assert control.main(options("--rows", "256", *flags)) == status
    assert ("missed: 256 decoding" in capsys.readouterr().out) == bool(status)


def test_allocations_are_counted_and_a_cached_block_is_small() -> None:
    report = allocations.measure()
    assert 10 < report.bytes_a_block <= control.BYTES_A_BLOCK
    for rows, steps in report.steps.items():
        assert steps.news <= 0.02 * rows, "growing token lists only"
        assert steps.mallocs > 1, "a plan is a Python object"
