"""Sessions with the statistics of recorded coding agents, drawn from a seed.

Each quantity is drawn from quantiles of 471 recorded sessions (31,932 turns). A history only grows, by what a
turn adds, except that one turn in twenty keeps a block less (a reminder moved), one in ninety branches off or
rewrites its history behind the system prompt, and a history that fills the client's context is compacted.
"""

from __future__ import annotations

import math

import numpy as np

from tokenspeed.simulate.sessions import Session, Turn

BLOCK = 64
"""`kept` is counted in whole blocks of this many tokens."""


class Quantiles:
    """A distribution given by values at cumulative shares; in between, the logarithm grows evenly.

    Shares rise from 0 to 1, values are above 0 and do not fall.
    """

    def __init__(self, *points: tuple[float, float]) -> None:
        self._shares = np.array([share for share, _ in points])
        self._logs = np.log([value for _, value in points])

    def at(self, share: float) -> float:
        """The value that this share of draws stays below."""
        return float(np.exp(np.interp(share, self._shares, self._logs)))

    def draw(self, random: np.random.Generator) -> float:
        """One value."""
        return self.at(random.random())


TURNS = Quantiles(
    (0, 2), (0.05, 5), (0.1, 7), (0.25, 19), (0.5, 47), (0.75, 90), (0.9, 151), (0.95, 227), (0.99, 334), (1, 514)
)
TOOL_SYS = Quantiles(
    (0, 8_000), (0.05, 10_067), (0.1, 11_746), (0.25, 12_804), (0.5, 15_033), (0.75, 15_494), (0.9, 15_930), (1, 23_081)
)
FIRST_PROMPT = Quantiles(
    (0, 9_000), (0.05, 13_092), (0.25, 18_613), (0.5, 23_836), (0.75, 104_190), (0.9, 261_922), (0.95, 408_824),
    (1, 851_858),
)  # fmt: skip
"""A session may begin as the continuation of another: its first prompt is long then."""
GROWTH = Quantiles(
    (0, 60), (0.05, 140), (0.1, 165), (0.25, 280), (0.5, 550), (0.75, 1_250), (0.9, 3_000), (0.95, 5_500),
    (0.99, 14_000), (1, 80_000),
)  # fmt: skip
"""Tokens by which a prompt exceeds the one before it: the answer, tool results, the user's words."""
OUTPUT = Quantiles(
    (0, 20), (0.05, 89), (0.1, 105), (0.25, 137), (0.5, 217), (0.75, 435), (0.9, 895), (0.95, 1_517), (0.99, 3_687),
    (1, 18_000),
)  # fmt: skip
THINK = Quantiles(
    (0, 1), (0.05, 3), (0.1, 4), (0.25, 6), (0.5, 10), (0.75, 35), (0.9, 179), (0.95, 505), (0.99, 2_963), (1, 30_000)
)
"""Seconds between an answer's end and the next request: tools that run, people who read."""
REWRITTEN = Quantiles((0, 0.5), (0.1, 0.9), (0.25, 1.0), (0.75, 1.02), (1, 1.4))
"""A rewritten prompt's length, as a share of the one before it."""
CONTEXT = Quantiles((0, 100_000), (0.15, 147_000), (0.6, 168_000), (0.72, 200_000), (0.88, 500_000), (1, 950_000))
"""Tokens at which a client compacts: of most, near 160,000."""

LONG_BEGINNINGS_END_SOON = -0.5
"""Correlation, as of a normal copula, of a session's first prompt and its number of turns."""
EARLY_GROWTH = 3.0
"""A session's turn number i adds 1 + this / i times the usual: first it reads files."""
SLIPS = 0.052
"""Share of turns that keep one block less than they could."""
REWRITES = 0.011
"""Share of turns that keep no more than tools and system prompt."""
COMPACTED = (0.2, 0.5)
"""What a compaction leaves, as a share of the prompt before it."""


def generate(count: int, seed: int) -> list[Session]:
    """`count` sessions; equal arguments give equal sessions."""
    random = np.random.default_rng(seed)
    return [_session(f"generated-{index:04}", random) for index in range(count)]


def _session(name: str, random: np.random.Generator) -> Session:
    beginning, length = _correlated_shares(random, LONG_BEGINNINGS_END_SOON)
    tool_sys = round(TOOL_SYS.draw(random))
    prompt = max(tool_sys + BLOCK, round(FIRST_PROMPT.at(beginning)))
    context = max(CONTEXT.draw(random), 1.2 * prompt)
    turns = [Turn(0, prompt, round(OUTPUT.draw(random)), 0.0)]
    for number in range(1, round(TURNS.at(length))):
        kept = prompt // BLOCK * BLOCK
        grown = prompt + max(BLOCK, round(GROWTH.draw(random) * (1.0 + EARLY_GROWTH / number)))
        if grown > context:
            kept, prompt = tool_sys // BLOCK * BLOCK, round(prompt * random.uniform(*COMPACTED))
        elif (fate := random.random()) < REWRITES:
            kept, prompt = tool_sys // BLOCK * BLOCK, round(min(prompt * REWRITTEN.draw(random), context))
        elif fate < REWRITES + SLIPS:
            kept, prompt = kept - BLOCK, grown
        else:
            prompt = grown
        prompt = max(prompt, kept + BLOCK)
        turns.append(Turn(kept, prompt - kept, round(OUTPUT.draw(random)), float(round(THINK.draw(random)))))
    return Session(name, tool_sys, tuple(turns))


def _correlated_shares(random: np.random.Generator, correlation: float) -> tuple[float, float]:
    """Two shares, each even between 0 and 1."""
    first, second = random.standard_normal(2)
    second = correlation * first + math.sqrt(1.0 - correlation**2) * second
    return _normal_share(first), _normal_share(second)


def _normal_share(value: float) -> float:
    return 0.5 * (1.0 + math.erf(value / math.sqrt(2.0)))
