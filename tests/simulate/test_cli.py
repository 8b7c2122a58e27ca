"""The command line: one table, one line for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tokenspeed.simulate.__main__ import main
from tokenspeed.simulate.report import ROWS
from tokenspeed.simulate.sessions import read_sessions

SHORT = ["--sessions", "2,4", "--warm-up", "2", "--window", "20", "--ramp", "2"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("simulate") / "sessions.json.gz"
    assert main(["generate", str(path), "--sessions", "30", "--seed", "3"]) == 0
    return str(path)


def test_the_table_has_every_figure_of_every_number_of_sessions(
    trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    assert main([trace, *SHORT, "--seed", "5", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "seed 5" in printed and printed.splitlines()[2].split() == ["sessions", "2", "4"]
    columns = json.loads(out.read_text())["figures"]
    assert [column["sessions"] for column in columns] == [2, 4]
    assert all(set(column) == {name for name, _, _ in ROWS} for column in columns)
    assert len(printed.splitlines()) == 2 + len(ROWS)


def test_equal_seeds_print_equal_figures(trace: str, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for seed in ("1", "1", "2"):
        assert main([trace, *SHORT, "--seed", seed]) == 0
        lines = capsys.readouterr().out.splitlines()
        tables.append([line for line in lines[2:] if not line.startswith(("CPU s", "speed-up"))])
    assert tables[0] == tables[1] != tables[2]


def test_the_same_seed_generates_the_same_bytes(trace: str, tmp_path: Path) -> None:
    again = tmp_path / "again.json.gz"
    assert main(["generate", str(again), "--sessions", "30", "--seed", "3"]) == 0
    assert again.read_bytes() == Path(trace).read_bytes() and len(read_sessions(again)) == 30


def test_a_missing_file_is_one_line_and_status_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tokenspeed.simulate", str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"simulate: cannot read {tmp_path / 'none.json'}: No such file or directory\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--kv-tokens", "63"], "num_blocks"),
        (["--kv-tokens", "6400"], "longer than the 6400"),
        (["--chunk-tokens", "4"], "max_tokens"),
        (["--promise", "--tps-floor", "0"], "--promise needs a --tps-floor"),
        (["--json", "/nonexistent/figures.json"], "cannot write /nonexistent/figures.json"),
    ],
)
def test_sizes_that_cannot_be_are_one_line_and_status_2(
    trace: str, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main([trace, *SHORT, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--step-model", "abacus"],
        ["--sessions", "8,0"],
        ["--sessions", "many"],
        ["--window", "0"],
        ["--warm-up", "-1"],
        ["--seed", "-1"],
        ["--host-gbps", "nan"],
        ["--policy", "best"],
    ],
)
def test_a_wrong_flag_is_named(trace: str, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([trace, *flags])
    assert stopped.value.code == 2 and flags[0] in capsys.readouterr().err


def test_a_trace_of_long_requests_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([{"id": "a", "tool_sys": 1, "turns": [[0, 200_000, 1, 0]]}]))
    assert main([str(path)]) == 2
    assert "every request is longer than 131072 tokens" in capsys.readouterr().err
