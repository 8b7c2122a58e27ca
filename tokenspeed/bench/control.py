"""The control plane alone, on one core: microseconds for a plan and a commit, Python door included.

Each row is one situation that a serving engine meets, set up for real and checked to be what it says. Every repeat
measures some hundred steps (or admissions); the table gives the median over repeats of the repeat's median, with the
least and greatest of them, and of its 99th percentile.

The targets hold on one core of an EPYC of about Zen 4. Elsewhere, `--check` judges the ratio to the scheduler in the
`tokenspeed-scheduler` wheel, measured in the same process, turn by turn: it must be the ratio of that scheduler's
time on the Zen 4 to the target. A row without such a time is judged by its target times the slowness of this machine:
the median over the other rows of upstream's least time here by its time there. Without the wheel the times are shown
and not judged. The bytes of a cached block are judged anywhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from tokenspeed.batch import Int32Array
from tokenspeed.bench import allocations, upstream
from tokenspeed.bench.contestants import BLOCK_SIZE, BenchError, Contestant, Ours, Sizes

VOCABULARY = 32_000
BYTES_A_BLOCK = 200
"""The most bookkeeping that a cached block may cost."""

Samples = list[tuple[int, int]]
"""Nanoseconds of (plan, commit) for a step, of (submit, plan) for an admission."""


@dataclass(frozen=True)
class Row:
    """One situation. Microseconds: what upstream's scheduler took on the Zen 4 (None: not known for a version that
    can still be installed), and what ours may take there."""

    name: str
    parts: tuple[str, str]
    upstream: float | None
    target: float
    sizes: Sizes
    prepare: Callable[[Contestant], Callable[[], tuple[int, int]]]
    """Sets the situation up; its result measures one step or admission, and leaves the situation as it was."""

    @property
    def ratio(self) -> float | None:
        """How many times faster than upstream's ours has to be."""
        return None if self.upstream is None else self.upstream / self.target


def prompt_of(length: int, seed: int) -> Int32Array:
    """Random tokens, so that nothing is shared by chance."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, length, dtype=np.int32)


def begin_decoding(contestant: Contestant, count: int, context: int) -> None:
    """Bring `count` requests of about `context` tokens to decode, their block borders spread over a block."""
    lengths = [context + BLOCK_SIZE * i // count for i in range(count)]
    for request_id, length in enumerate(lengths):
        contestant.submit(request_id, prompt_of(length, request_id), max_tokens=16_000)
    for _ in range(sum(lengths) // 4096 + 2 * count + 8):
        contestant.step()
    if contestant.rows() != count or contestant.waiting():
        raise BenchError(f"{contestant.rows()} of {count} requests decode")


def decoding(count: int, context: int) -> Callable[[Contestant], Callable[[], tuple[int, int]]]:
    """A step in which `count` requests decode and nothing else happens."""

    def prepare(contestant: Contestant) -> Callable[[], tuple[int, int]]:
        begin_decoding(contestant, count, context)

        def measure() -> tuple[int, int]:
            times = contestant.step()
            if contestant.rows() != count:
                raise BenchError(f"{contestant.rows()} of {count} requests decode")
            return times

        return measure

    return prepare


def backlog(contestant: Contestant) -> Callable[[], tuple[int, int]]:
    """A step in which 2 requests decode while 200 prompts of 32K tokens wait for memory."""
    begin_decoding(contestant, 2, 20_000)
    for i in range(200):
        contestant.submit(10 + i, prompt_of(32_768, 10 + i), max_tokens=100)
    contestant.step()

    def measure() -> tuple[int, int]:
        times = contestant.step()
        if (contestant.rows(), contestant.waiting()) != (2, 200):
            raise BenchError(f"{contestant.rows()} rows and {contestant.waiting()} waiting, not 2 and 200")
        return times

    return measure


class Admissions:
    """Admit a prompt of a cached beginning and a new end, again and again: submit, and the plan that admits it."""

    def __init__(self, contestant: Contestant, cached: Int32Array, length: int) -> None:
        self._contestant = contestant
        self._cached = cached
        self._length = length
        self._next_id = 1_000

    def run(self, prompt: Int32Array) -> tuple[int, int]:
        """Submit a prompt, compute it, and end it; how long the submission and the first plan took."""
        contestant, request_id = self._contestant, self._next_id
        self._next_id += 1
        submitted = contestant.submit(request_id, prompt, max_tokens=16)
        planned, _ = contestant.step()
        cached = contestant.cached_tokens(request_id)
        for _ in range(len(prompt) // 4096):
            contestant.step()
        contestant.finish(request_id)
        expected = len(self._cached) if len(prompt) == self._length else 0
        if cached != expected:
            raise BenchError(f"{cached} tokens of a prompt were cached, not {expected}")
        return submitted, planned

    def __call__(self) -> tuple[int, int]:
        end = prompt_of(self._length - len(self._cached), self._next_id)
        return self.run(np.concatenate([self._cached, end]))


def admit_long(contestant: Contestant) -> Callable[[], tuple[int, int]]:
    """50,000 tokens of which 49,152 are cached."""
    cached = prompt_of(49_152, 1)
    admissions = Admissions(contestant, cached, 50_000)
    admissions.run(np.concatenate([cached, prompt_of(10, 2)]))
    return admissions


def admit_into_full(contestant: Contestant) -> Callable[[], tuple[int, int]]:
    """8,192 new tokens into a pool of 60,000 blocks that are all cached: 128 are evicted."""
    admissions = Admissions(contestant, prompt_of(0, 0), 8192)
    for seed in range(120):
        admissions.run(prompt_of(500 * BLOCK_SIZE + 1, 1_000_000 + seed))
    return admissions


ROWS = (
    Row("1 decoding", ("plan", "commit"), 5.1, 4, Sizes(20_000, 4), decoding(1, 100)),
    Row("64 decoding", ("plan", "commit"), 149, 20, Sizes(20_000, 64), decoding(64, 100)),
    Row("256 decoding", ("plan", "commit"), 659, 60, Sizes(40_000, 256), decoding(256, 100)),
    Row("64 decoding at 65K context", ("plan", "commit"), 4_000, 25, Sizes(90_000, 64), decoding(64, 65_536)),
    Row("2 decoding, 200 x 32K waiting", ("plan", "commit"), 125_000, 10, Sizes(1_000, 256), backlog),
    Row("admit 50,000, 49,152 cached", ("submit", "plan"), 1_103, 250, Sizes(2_000, 4), admit_long),
    Row("admit 8K, 60K blocks cached", ("submit", "plan"), None, 100, Sizes(60_000, 4), admit_into_full),
)


@dataclass
class Measured:
    """The repeats of one row for one contestant, in microseconds."""

    medians: list[float] = field(default_factory=list)
    p99s: list[float] = field(default_factory=list)
    parts: list[tuple[float, float]] = field(default_factory=list)

    def add(self, samples: Samples) -> None:
        times = np.array(samples, dtype=np.float64) / 1e3
        total = times.sum(axis=1)
        self.medians.append(float(np.median(total)))
        self.p99s.append(float(np.percentile(total, 99)))
        first, second = np.median(times, axis=0).tolist()
        self.parts.append((first, second))

    @property
    def median(self) -> float:
        return float(np.median(self.medians))

    @property
    def least(self) -> float:
        return min(self.medians)

    @property
    def p99(self) -> float:
        return float(np.median(self.p99s))

    @property
    def part_medians(self) -> tuple[float, float]:
        first, second = np.median(np.array(self.parts), axis=0).tolist()
        return first, second


def sample(measure: Callable[[], tuple[int, int]], count: int, seconds: float) -> Samples:
    """`count` samples, fewer (at least 3) where they take longer than `seconds` together."""
    samples: Samples = []
    spent = 0
    while len(samples) < count and (len(samples) < 3 or spent < seconds * 1e9):
        samples.append(measure())
        spent += sum(samples[-1])
    return samples


def measure_row(row: Row, makers: list[Callable[[Sizes], Contestant]], repeats: int, seconds: float) -> list[Measured]:
    """One result for each contestant. They take turns within each repeat, so that a slow moment meets all."""
    measures = [row.prepare(make(row.sizes)) for make in makers]
    results = [Measured() for _ in measures]
    for _ in range(repeats):
        for measure, result in zip(measures, results, strict=True):
            result.add(sample(measure, 600, seconds))
    return results


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m tokenspeed.bench control`."""
    parser.add_argument("--repeats", type=int, default=5, help="how often each row is measured (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="at most so long a repeat and row (%(default)s)")
    parser.add_argument("--rows", default="", metavar="TEXT", help="only rows whose name contains TEXT")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a row misses its target")
    parser.add_argument("--no-upstream", action="store_true", help="leave the wheel alone even if it is installed")


def main(options: argparse.Namespace) -> int:
    """Measure, print, judge; the return value is the exit status."""
    version = None if options.no_upstream else upstream.installed()
    makers: list[Callable[[Sizes], Contestant]] = [Ours] if version is None else [Ours, upstream.Upstream]
    print(f"upstream: {'not measured' if version is None else f'tokenspeed-scheduler {version}'}\n\n{HEADING}")
    results = []
    missed = []
    try:
        for row in ROWS:
            if options.rows in row.name:
                ours, *theirs = measure_row(row, makers, options.repeats, options.seconds)
                print(line(row, ours, theirs[0] if theirs else None), flush=True)
                results += [(row, ours, their) for their in theirs]
        if not options.rows:
            missed += report_memory()
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not options.check:
        return 0
    if version is None:
        print("the times are not judged: they are not measured beside upstream's")
    missed += misses(results)
    print(f"missed: {', '.join(missed)}" if missed else "no target missed")
    return 1 if missed else 0


def misses(results: list[tuple[Row, Measured, Measured]]) -> list[str]:
    """The rows that miss their target, from (row, ours, upstream's)."""
    slowness = [theirs.least / row.upstream for row, _, theirs in results if row.upstream is not None]
    machine = float(np.median(slowness)) if slowness else 1.0
    missed = []
    for row, ours, theirs in results:
        if row.ratio is None:
            print(f"{row.name}: judged by {row.target:g} µs x {machine:.2f}, the slowness of this machine")
            met = ours.median <= row.target * machine
        else:
            met = theirs.median / ours.median >= row.ratio
        if not met:
            missed.append(row.name)
    return missed


HEADING = (
    f"{'µs':<30} {'ours':>8} {'least':>8} {'most':>8} {'p99':>8}  {'parts':<24} {'target':>7}"
    f" {'upstream':>10} {'ratio':>8} {'needed':>8}"
)


def line(row: Row, ours: Measured, theirs: Measured | None) -> str:
    """One row of the table."""
    parts = ", ".join(f"{name} {value:.2f}" for name, value in zip(row.parts, ours.part_medians, strict=True))
    text = (
        f"{row.name:<30} {ours.median:>8.2f} {ours.least:>8.2f} {max(ours.medians):>8.2f} {ours.p99:>8.2f}"
        f"  {parts:<24} {row.target:>7g}"
    )
    if theirs is not None:
        needed = "-" if row.ratio is None else f"{row.ratio:.1f}"
        text += f" {theirs.median:>10.1f} {theirs.median / ours.median:>8.1f} {needed:>8}"
    return text


def report_memory() -> list[str]:
    """Print allocations a step and bytes a cached block; which of them miss their target."""
    found = allocations.measure()
    print()
    for rows, steps in found.steps.items():
        print(
            f"allocations a step, {rows} decoding: {steps.news:.3f} by operator new, "
            f"{steps.mallocs:.2f} in all, Python objects included"
        )
    if not found.steps:
        print("allocations a step: not counted, there is no C++ compiler")
    print(f"bookkeeping of {found.num_blocks:,} cached blocks: {found.bytes_a_block:.1f} bytes each ({found.source})")
    return [] if found.bytes_a_block <= BYTES_A_BLOCK else ["bytes a cached block"]
