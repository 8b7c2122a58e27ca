"""The best layout at a user's speed, and the plot: from lines of JSON, by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tokenspeed.bench import pareto
from tokenspeed.bench.pareto import COLOURS, Curve, Point, best, svg, ticks

CUT = Curve("cut", (Point(1, 300.0, 75.0), Point(4, 150.0, 120.0), Point(16, 50.0, 160.0)))
DEALT = Curve("dealt", (Point(1, 180.0, 45.0), Point(4, 120.0, 100.0), Point(16, 80.0, 240.0)))


def ran(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    pareto.add_flags(parser)
    return pareto.main(parser.parse_args(arguments))


def test_between_two_points_the_line_counts_and_on_either_side_the_best_that_keeps_the_speed() -> None:
    # Halfway between 150 and 50 tok/s a user.
    assert CUT.most(100.0) == (140.0, "between 4 and 16 sessions")
    assert CUT.most(150.0) == (120.0, "4 sessions")
    assert CUT.most(20.0) == (160.0, "16 sessions"), "more sessions were not tried"
    assert CUT.most(301.0) is None
    # A point beyond that is worse for both does not count.
    assert Curve("late", (*CUT.points[:2], Point(16, 140.0, 90.0))).most(145.0) == (120.0, "4 sessions")


def test_the_order_of_layouts_depends_on_the_speed() -> None:
    assert best([CUT, DEALT], 70.0) == ("70 tok/s a user: dealt, 240 output tok/s a GPU (16 sessions); cut 152")
    assert best([DEALT, CUT], 140.0).startswith("140 tok/s a user: cut, 124 ")
    assert best([CUT, DEALT], 200.0) == "200 tok/s a user: cut, 105 output tok/s a GPU (between 1 and 4 sessions)"
    assert best([CUT, DEALT], 400.0) == "400 tok/s a user: no layout"


def test_lines_of_both_programs_are_read_whatever_their_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    agentic, serve = tmp_path / "a.json", tmp_path / "b.json"
    lines = [
        {"concurrency": 4, "output_tok_s": 480.0, "user_tok_s": 150.0, "layout": "-tp 4", "gpus": 4},
        {"concurrency": 1, "output_tok_s": 300.0, "user_tok_s": 300.0, "layout": "-tp 4", "gpus": 4},
    ]
    agentic.write_text("\n".join(map(json.dumps, lines)))
    serve.write_text(json.dumps({"concurrency": 2, "output_tok_s": 50.0, "stream_tok_s_p50": 90.0, "errors": 0}) + "\n")
    assert ran(str(agentic), str(serve), "--gpus", "2", "--at", "80", "150") == 0
    assert capsys.readouterr().out.splitlines() == [
        "80 tok/s a user: -tp 4, 120 output tok/s a GPU (4 sessions); b 25",
        "150 tok/s a user: -tp 4, 120 output tok/s a GPU (4 sessions)",
    ]
    assert ran(f"named={agentic}", "--at", "70") == 0
    assert capsys.readouterr().out.startswith("70 tok/s a user: named, ")


def test_repeats_of_a_number_of_sessions_are_one_point_the_median_of_each_figure(tmp_path: Path) -> None:
    file = tmp_path / "repeats.json"
    each = [(4, 100.0, 500.0), (1, 300.0, 320.0), (4, 140.0, 400.0), (4, 110.0, 900.0), (1, 280.0, 300.0)]
    file.write_text(
        "".join(
            json.dumps({"concurrency": sessions, "user_tok_s": user, "output_tok_s": rate, "gpus": 2}) + "\n"
            for sessions, user, rate in each
        )
    )
    curve = pareto.read(str(file), 1)
    assert curve.points == (Point(1, 290.0, 155.0), Point(4, 110.0, 250.0))
    assert curve.most(105.0) == (250.0, "4 sessions"), "not the 450 of the luckiest"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("", "no line in it"),
        ("{", "truncated"),
        ('{"concurrency": 1}', "output_tok_s"),
        ('{"concurrency": 3, "output_tok_s": 1}', "3 sessions without user_tok_s"),
    ],
)
def test_a_file_that_is_no_curve_is_one_line(
    tmp_path: Path, content: str | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    if content is not None:
        file.write_text(content)
    assert ran(str(file)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pareto: {file}: ") and said in error and error.count("\n") == 1


def test_ticks_are_round_and_reach_beyond() -> None:
    assert ticks(397.0) == [0, 50, 100, 150, 200, 250, 300, 350, 400]
    assert ticks(400.0)[-1] == 400 and ticks(0.0)[0] == 0
    assert all(4 <= len(ticks(most)) - 1 <= 10 and ticks(most)[-1] >= most for most in (0.3, 1.0, 7.7, 99.0, 1234.0))


def test_a_plot_has_a_curve_a_layout_and_a_line_a_speed(tmp_path: Path) -> None:
    parts = ElementTree.fromstring(svg([CUT, Curve("a < b & c", DEALT.points)], [70.0, 100.0, 200.0]))
    space = "{http://www.w3.org/2000/svg}"
    curves = parts.findall(f"{space}polyline")
    assert [curve.get("stroke") for curve in curves] == list(COLOURS[:2])
    first = [tuple(map(float, pair.split(","))) for pair in curves[0].get("points", "").split()]
    assert len(first) == 3
    # Fewer sessions stand further right and lower; nothing leaves the picture.
    assert first[0][0] > first[1][0] > first[2][0] and first[0][1] > first[1][1] > first[2][1]
    assert all(pareto.LEFT <= x <= pareto.WIDTH - pareto.RIGHT and pareto.TOP <= y <= pareto.HEIGHT for x, y in first)
    dashed = [line for line in parts.findall(f"{space}line") if line.get("stroke-dasharray")]
    assert len(dashed) == 3 and all(line.get("x1") == line.get("x2") for line in dashed)
    assert "a < b & c" in [text.text for text in parts.findall(f"{space}text")]
    assert len(parts.findall(f"{space}circle")) == 6
