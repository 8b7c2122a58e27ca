"""The benchmark of steps with prompts measures the steps that it names, and its shares add up."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.toy import toy_llama
from tokenspeed.batch import StepTimes
from tokenspeed.bench import steps
from tokenspeed.bench.steps import Level, Measured, Record
from tokenspeed.executor import kernel_times


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    steps.add_flags(parser)
    return parser.parse_args(["--model", "m", *flags])


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_what_a_step_waits_for_is_the_difference_of_the_medians() -> None:
    measured = Measured(3, [0.010, 0.012, 0.011], [0.030, 0.050, 0.031], [0.020, 0.021, 0.040], [0.05])
    assert cells(steps.row(50_000, 512, measured)) == [
        "512 behind 50,000", "3", "11.00 (10.00–12.00)", "31.00 (30.00–50.00)", "21.00 (20.00–40.00)", "10.00",
        "50.00 (50.00–50.00)",
    ]  # fmt: skip


def test_steps_are_added_up_by_their_prompt_tokens_and_the_rest_lies_between_them() -> None:
    records = [
        Record(8, 0, 0.001, StepTimes(0.007, 0.001)),
        Record(8, 0, 0.001, StepTimes(0.009, 0.001)),
        Record(7, 816, 0.030, StepTimes(0.060, 0.002)),
        Record(5, 1024, 0.010, StepTimes(0.080, 0.002)),
        Record(0, 1025, 0.010, StepTimes(0.100, 0.000)),
    ]
    decode, small, large, between, whole = "\n".join(steps.shares(8, Level(records, 0.5, 1000, [0.1, 0.3]))).split("\n")
    assert cells(decode)[1:] == ["decode alone", "2", "0", "8.0", "1.00", "9.00", "0.02", "3.6%"]
    assert cells(small)[1:] == ["up to 1,024 prompt tokens", "2", "920", "6.0", "20.00", "72.00", "0.14", "28.8%"]
    assert cells(large)[1:4] == ["up to 2,048 prompt tokens", "1", "1,025"]
    assert cells(between)[-2:] == ["0.24", "47.6%"]
    assert "2000 output tok/s" in whole and "200 ms" in whole


@pytest.mark.parametrize(("slowest", "device"), [(0.19, [0.031, 0.041]), (0.2, []), (0.3, [])])
def test_a_step_enqueued_for_as_long_as_the_pause_leaves_the_device_column_empty(
    slowest: float, device: list[float]
) -> None:
    held = [Record(8, 512, 0.010, StepTimes(0.030, 0.001)), Record(8, 512, slowest, StepTimes(0.040, 0.001))]
    assert steps.undisturbed(held) == pytest.approx(device)


@pytest.mark.parametrize("flags", [("--beside", "2", "8"), ("--beside",), ("--new",)])
def test_a_profile_of_no_step_is_refused_before_anything_is_loaded(tmp_path: Path, flags: tuple[str, ...]) -> None:
    absent, profile = str(tmp_path / "absent"), str(tmp_path / "profile")
    with pytest.raises(SystemExit, match=r"--profile .* --new, and 0 among --beside"):
        steps.main(options("--model", absent, "--profile", profile, *flags))


@pytest.mark.skipif(kernel_times.available(), reason="there is a GPU")
def test_a_profile_without_a_gpu_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="none here"):
        steps.main(options("--model", str(tmp_path / "absent"), "--profile", str(tmp_path / "profile")))


def test_every_size_gets_a_row_alone_and_beside_streams_and_sessions_their_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENSPEED_DEVICE", "cpu")
    toy_llama(tmp_path)
    asked = options(
        "--model", str(tmp_path), "--context", "64", "--new", "5", "20", "--beside", "0", "2", "--repeats", "2",
        "--stream-tokens", "300", "--sessions", "2", "--turns", "3", "--more", "4", "--output", "6",
    )  # fmt: skip
    assert steps.main(asked) == 0
    printed = capsys.readouterr().out.splitlines()
    rows = [cells(line) for line in printed if " behind 64 |" in line]
    assert [cell[:2] for cell in rows] == [
        [f"{new} behind 64", decoding] for decoding in ("0", "2") for new in ("5", "20")
    ]
    assert printed[-1].startswith("| 2 | all: ") and "output tok/s" in printed[-1]
    decode = next(cells(line) for line in printed if "| decode alone |" in line)
    # Of each turn's six tokens the first comes with the prompt; both sessions may share steps or not.
    assert 15 <= int(decode[2]) <= 30 and 1.0 <= float(decode[4]) <= 2.0
    assert sum(int(cells(line)[2]) for line in printed if "prompt tokens |" in line and line.startswith("| 2 |")) >= 3


@pytest.mark.parametrize(("seconds", "empty"), [(0.0, True), (3600.0, False)])
def test_the_device_column_is_of_held_steps_that_were_enqueued_within_the_pause(
    seconds: float, empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENSPEED_DEVICE", "cpu")
    monkeypatch.setattr(kernel_times, "available", lambda: True)
    held: list[int] = []
    monkeypatch.setattr(kernel_times, "hold", held.append)
    monkeypatch.setattr(steps, "PAUSE_SECONDS", seconds)
    toy_llama(tmp_path)
    sizes = ("--context", "64", "--new", "5", "--beside", "0", "--repeats", "2", "--stream-tokens", "100")
    assert steps.main(options("--model", str(tmp_path), *sizes)) == 0
    row = next(cells(line) for line in capsys.readouterr().out.splitlines() if " behind 64 |" in line)
    assert held == [steps.PAUSE] * 2
    assert [cell == "–" for cell in row[2:]] == [False, False, empty, empty, False]


def test_a_prompt_that_comes_in_several_steps_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSPEED_DEVICE", "cpu")
    toy_llama(tmp_path)
    asked = options(
        "--model", str(tmp_path), "--context", "64", "--new", "300", "--beside", "0", "--stream-tokens", "300"
    )
    with pytest.raises(SystemExit, match="300 tokens behind 64 cached ones came as steps of 256, 44"):
        steps.main(asked)
