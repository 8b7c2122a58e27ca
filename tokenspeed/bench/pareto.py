"""Speed of a user against what a GPU gives, a curve a layout, from what `agentic --json` or `serve --json` wrote.

Each file is a curve: a point for each number of sessions, x the tokens a second of a user, y the output tokens a second
of one GPU; repeats of one number are one point, the median of each. For each `--at` it says which layout gives most
while a user gets at least that much: the best point that keeps it, or where the line between two neighbouring points
crosses it.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import msgspec

from tokenspeed.bench.agentic import positive
from tokenspeed.bench.figures import Figure

WIDTH, HEIGHT = 860, 540
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 30, 60
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which most eyes tell apart."""


@dataclass(frozen=True, slots=True)
class Point:
    """So many sessions at once: tokens a second of a user, output tokens a second of one GPU."""

    sessions: int
    user: float
    gpu: float


@dataclass(frozen=True, slots=True)
class Curve:
    """A layout's points, by sessions."""

    name: str
    points: tuple[Point, ...]

    def most(self, floor: float) -> tuple[float, str] | None:
        """Output tokens a second of a GPU while a user gets `floor`, and with how many sessions. None: not ever."""
        kept = [(point.gpu, f"{point.sessions} sessions") for point in self.points if point.user >= floor]
        for one, other in itertools.pairwise(self.points):
            fast, slow = (one, other) if one.user > other.user else (other, one)
            if fast.user > floor > slow.user:
                share = (fast.user - floor) / (fast.user - slow.user)
                gpu = fast.gpu + share * (slow.gpu - fast.gpu)
                kept.append((gpu, f"between {one.sessions} and {other.sessions} sessions"))
        return max(kept, default=None)


class FiguresError(Exception):
    """A file that is no curve; the message is one line."""


def read(argument: str, gpus: int) -> Curve:
    """The curve of `FILE` or `NAME=FILE`; lines that do not say over how many GPUs are over `gpus`. Lines of as many
    sessions are one point, or the luckiest of `--repeats` would stand for its layout."""
    name, equals, path = argument.rpartition("=")
    file = Path(path)
    try:
        figures = [msgspec.json.decode(line, type=Figure) for line in file.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise FiguresError(f"{file}: {error.strerror or error}") from error
    except msgspec.MsgspecError as error:
        raise FiguresError(f"{file}: {error}") from error
    if not figures:
        raise FiguresError(f"{file}: no line in it")
    rates: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for figure in figures:
        user = figure.stream_tok_s_p50 if figure.user_tok_s is None else figure.user_tok_s
        if user is None:
            raise FiguresError(f"{file}: {figure.concurrency} sessions without user_tok_s or stream_tok_s_p50")
        rates[figure.concurrency].append((user, figure.output_tok_s / (figure.gpus or gpus)))
    points = tuple(
        Point(sessions, *map(statistics.median, zip(*each, strict=True))) for sessions, each in sorted(rates.items())
    )
    return Curve(name if equals else figures[0].layout or file.stem, points)


def best(curves: Sequence[Curve], floor: float) -> str:
    """A line: which layout gives most at `floor` tokens a second a user, and what the others give."""
    found = [(most, curve.name) for curve in curves if (most := curve.most(floor)) is not None]
    if not found:
        return f"{floor:g} tok/s a user: no layout"
    ((rate, how), name), *others = sorted(found, reverse=True)
    told = f"{floor:g} tok/s a user: {name}, {rate:,.0f} output tok/s a GPU ({how})"
    return "; ".join([told, *(f"{other} {given[0]:,.0f}" for given, other in others)])


def ticks(most: float) -> list[float]:
    """Round numbers from 0 to beyond `most`, four to ten."""
    rough = max(most, 1e-9) / 8
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [step * index for index in range(math.ceil(most / step) + 1)]


def svg(curves: Sequence[Curve], floors: Sequence[float]) -> str:
    """The plot as an SVG document."""
    points = [point for curve in curves for point in curve.points]
    across, up = ticks(max(*floors, *(point.user for point in points))), ticks(max(point.gpu for point in points))
    return "\n".join(_elements(curves, floors, across, up)) + "\n"


def _elements(curves: Sequence[Curve], floors: Sequence[float], across: list[float], up: list[float]) -> Iterator[str]:
    def x(user: float) -> float:
        return round(LEFT + user / across[-1] * (WIDTH - LEFT - RIGHT), 1)

    def y(gpu: float) -> float:
        return round(HEIGHT - BOTTOM - gpu / up[-1] * (HEIGHT - TOP - BOTTOM), 1)

    def line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
        return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" {style}/>'

    def text(at: float, down: float, said: str, style: str = "") -> str:
        return f'<text x="{at}" y="{down}" {style}>{escape(said)}</text>'

    middle = 'text-anchor="middle"'
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
    )
    for value in across:
        yield line(x(value), y(0), x(value), y(up[-1]), 'stroke="#e5e5e5"')
        yield text(x(value), y(0) + 18, f"{value:,.5g}", middle)
    for value in up:
        yield line(x(0), y(value), x(across[-1]), y(value), 'stroke="#e5e5e5"')
        yield text(x(0) - 8, y(value) + 4, f"{value:,.5g}", 'text-anchor="end"')
    for floor in floors:
        yield line(x(floor), y(0), x(floor), y(up[-1]), 'stroke="#888" stroke-dasharray="5 4"')
    yield text(x(across[-1] / 2), HEIGHT - 18, "tokens a second of a user", middle)
    yield text(LEFT - 50, TOP - 10, "output tokens a second of a GPU; beside a point: sessions at once")
    for index, curve in enumerate(curves):
        colour = COLOURS[index % len(COLOURS)]
        path = " ".join(f"{x(point.user)},{y(point.gpu)}" for point in curve.points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for point in curve.points:
            yield f'<circle cx="{x(point.user)}" cy="{y(point.gpu)}" r="4" fill="{colour}"/>'
            yield text(x(point.user) + 6, y(point.gpu) - 6, str(point.sessions), f'fill="{colour}"')
        row = TOP + 18 * (index + 1)
        yield text(WIDTH - RIGHT - 10, row, curve.name, f'fill="{colour}" text-anchor="end"')
    yield "</svg>"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `pareto`."""
    parser.add_argument("files", nargs="+", metavar="[NAME=]FILE", help="JSON lines of a layout")
    parser.add_argument("--gpus", type=positive, default=1, help="of lines that do not say, as those of `serve`")
    parser.add_argument("--at", type=float, nargs="+", default=[70.0, 100.0, 200.0], help="tokens a second of a user")
    parser.add_argument("--svg", type=Path, help="where to write the plot")


def main(options: argparse.Namespace) -> int:
    """Print the best layout at each rate; 2 for a file that is no curve."""
    try:
        curves = [read(argument, options.gpus) for argument in options.files]
    except FiguresError as error:
        print(f"pareto: {error}", file=sys.stderr)
        return 2
    for floor in options.at:
        print(best(curves, floor))
    if options.svg is not None:
        options.svg.write_text(svg(curves, options.at))
    return 0
