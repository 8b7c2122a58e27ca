"""The agentic benchmark counts turns as it says, and its sessions hit the cache with their own history."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import pytest

from tests.toy import toy_llama
from tokenspeed.bench import agentic
from tokenspeed.bench.agentic import Level, Turn
from tokenspeed.bench.figures import Figure
from tokenspeed.config import Parallel
from tokenspeed.errors import ConfigError


def turn(began: float, prompt: int, cached: int, times: list[float]) -> Turn:
    return Turn(began, prompt, cached, times, [0] * len(times))


def test_rates_are_of_all_turns_and_ttft_of_first_and_later_ones_apart() -> None:
    first = turn(0.0, 100, 0, [2.0, 2.1, 2.2])
    later = turn(3.0, 120, 100, [3.5, 3.6, 3.7, 4.0])
    level = Level([first], [later])
    assert level.seconds == 4.0
    assert level.user_rate() == pytest.approx(1 / ((0.1 + 0.5 / 3) / 2))
    assert level.output_rate() == pytest.approx(7 / 4)
    assert level.total_rate() == pytest.approx(227 / 4)
    assert level.at_floor(8.0) == (0.5, 0.5)
    cells = [cell.strip() for cell in agentic.row(1, level, 70.0, [None, 3.5]).strip("|").split("|")]
    assert cells[3] == f"{120 / 4:,.0f}"
    assert cells[6:11] == ["2.000 (2.000–2.000)", "0.500", "0.500", "1.000", "83.3%"]
    assert cells[13:] == ["–", "0.50"]


def test_a_stream_that_pauses_keeps_its_mean_but_not_every_second() -> None:
    steady = [0.01 * n for n in range(100)]
    level = Level([turn(0.0, 1, 0, [*steady, *(time + 2.0 for time in steady)])], [])
    assert level.at_floor(60.0) == (1.0, 0.0)


def test_turns_of_one_token_have_no_rate_and_miss_no_floor() -> None:
    level = Level([turn(0.0, 1000, 0, [0.5])], [])
    assert level.user_rate() == 0.0
    assert level.at_floor(70.0) == (1.0, 1.0)
    assert "| – | – | – |" in agentic.row(1, level, 70.0, [None, None])


@pytest.mark.parametrize("flags", [("--concurrency", "0"), ("--turns", "-1"), ("--first", "many")])
def test_a_flag_that_is_no_number_is_refused(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    agentic.add_flags(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
    assert "is not a number of at least 1" in capsys.readouterr().err


def test_sessions_run_and_later_turns_find_their_history(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy_llama(tmp_path)
    parser = argparse.ArgumentParser()
    agentic.add_flags(parser)
    sizes = ("--first", "200", "--more", "10", "--output", "6", "--turns", "3", "--concurrency", "1", "2")
    figures = tmp_path / "figures.json"
    figures.write_text("of an earlier run\n")
    assert agentic.main(parser.parse_args(["--model", str(tmp_path), "--json", str(figures), *sizes])) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| 1 |", "| 2 |"))]
    assert len(rows) == 2
    for line in rows:
        hit = float(line.strip("|").split("|")[10].strip().removesuffix("%"))
        assert 80.0 < hit < 100.0
    for line, said in zip(rows, figures.read_bytes().splitlines(), strict=True):
        told = msgspec.json.decode(said, type=Figure)
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        assert cells[:3] == [f"{told.concurrency}", f"{told.user_tok_s:.0f}", f"{told.output_tok_s:.0f}"]
        assert (told.layout, told.gpus) == ("-tp 1", 1)


def test_an_engine_that_does_not_start_leaves_the_figures_of_an_earlier_run(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    agentic.add_flags(parser)
    figures = tmp_path / "figures.json"
    figures.write_text("of an earlier run\n")
    with pytest.raises(ConfigError):
        agentic.main(parser.parse_args(["--model", str(tmp_path / "absent"), "--json", str(figures)]))
    assert figures.read_text() == "of an earlier run\n"


def test_a_layout_is_told_by_its_flags() -> None:
    level = Level([turn(0.0, 100, 0, [1.0, 2.0])], [])
    told = agentic.figure(3, level, Parallel(world=4, attn_dp=4, moe_ep=4))
    assert told == Figure(
        concurrency=3, output_tok_s=1.0, user_tok_s=1.0, layout="-tp 4 --attn-dp-size 4 --moe-ep-size 4", gpus=4
    )
