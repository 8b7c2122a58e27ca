"""Sessions of coding agents on the engine, in a closed loop: turns that repeat their history and add a little.

Each of C sessions sends a first prompt of `--first` random tokens; every further turn sends the whole conversation,
what was generated included, and `--more` new ones, as soon as the turn before it has ended. End-of-sequence is ignored,
so each turn generates `--output` tokens. A number of sessions is one row; rows share nothing, as all prompts are new.
Times are taken where a Python application takes them: at `AsyncEngine`, behind the engine process and the detokenizer.

tok/s a user is 1 / the mean time of an output token after the first; "per minute" is what the device gave from the
first request to the last token, and the same with prompt tokens counted, cached ones too. `--turns 1 --output 1`
measures the first token of a cold prompt alone.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from tokenspeed.bench.figures import Figure
from tokenspeed.config import EngineConfig, Parallel
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.parallel.mesh import ARGUMENTS, FLAGS
from tokenspeed.request import SamplingParams
from tokenspeed.simulate.report import sliding_seconds


@dataclass(slots=True)
class Turn:
    """One request. Times in seconds of the process's clock; `times` has one for each token."""

    began: float
    prompt: int
    cached: int = 0
    times: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[0] - self.began

    @property
    def whole(self) -> float:
        """Seconds to the last token."""
        return self.times[-1] - self.began

    @property
    def token_seconds(self) -> float:
        """Mean time of an output token after the first; 0 for a turn of one token."""
        return (self.times[-1] - self.times[0]) / max(len(self.times) - 1, 1)


@dataclass(frozen=True, slots=True)
class Level:
    """What C sessions gave. `first` and `later` are the first turns of sessions and all others."""

    first: list[Turn]
    later: list[Turn]

    @property
    def turns(self) -> list[Turn]:
        return [*self.first, *self.later]

    @property
    def seconds(self) -> float:
        return max(turn.times[-1] for turn in self.turns) - min(turn.began for turn in self.turns)

    def user_rate(self) -> float:
        """Tokens a second of a user; 0 where turns have one token."""
        mean = statistics.mean(turn.token_seconds for turn in self.turns)
        return 1.0 / mean if mean else 0.0

    def output_rate(self) -> float:
        return sum(len(turn.tokens) for turn in self.turns) / self.seconds

    def total_rate(self) -> float:
        """Prompt tokens counted too, cached or not."""
        return sum(turn.prompt + len(turn.tokens) for turn in self.turns) / self.seconds

    def at_floor(self, floor: float) -> tuple[float, float]:
        """The share of turns whose mean rate keeps `floor`, and of those that keep it in every sliding second."""
        rated = [turn for turn in self.turns if len(turn.times) > 1 and turn.times[-1] > turn.times[0]]
        if not rated:
            return 1.0, 1.0
        mean = sum(turn.token_seconds * floor <= 1.0 for turn in rated)
        always = sum(float(sliding_seconds(np.asarray(turn.times))[0].min()) >= floor for turn in rated)
        return mean / len(rated), always / len(rated)


class Sessions:
    """Runs sessions on an engine. One instance draws all prompts, so that none repeats."""

    def __init__(self, engine: AsyncEngine, options: argparse.Namespace) -> None:
        self._engine = engine
        self._options = options
        self._draw = random.Random(options.seed)
        self._params = SamplingParams(
            temperature=options.temperature, max_tokens=options.output, ignore_eos=True, skip_special_tokens=False
        )

    async def level(self, concurrency: int) -> Level:
        """All turns of `concurrency` sessions at once."""
        sessions = await asyncio.gather(*(self._session() for _ in range(concurrency)))
        return Level([turns[0] for turns in sessions], [turn for turns in sessions for turn in turns[1:]])

    async def _session(self) -> list[Turn]:
        options, turns = self._options, list[Turn]()
        prompt = self._random(options.first)
        for number in range(options.turns):
            if number:
                prompt = [*prompt, *turns[-1].tokens, *self._random(options.more)]
            turns.append(await self._turn(prompt))
        return turns

    async def _turn(self, prompt: list[int]) -> Turn:
        turn = Turn(time.perf_counter(), len(prompt))
        async for output in self._engine.generate(prompt, self._params, tps_floor=self._options.tps_floor):
            now = time.perf_counter()
            turn.tokens += output.token_ids
            turn.times += [now] * len(output.token_ids)
            turn.cached = output.num_cached_tokens
            if output.finish_reason == "error":
                raise SystemExit(f"a turn ended with an error: {output.error}")
        return turn

    def _random(self, count: int) -> list[int]:
        vocab_size = self._engine.facts.vocab_size
        return [self._draw.randrange(vocab_size) for _ in range(count)]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `agentic`."""
    parser.add_argument("--model", help="a checkpoint; without it the embedded model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--concurrency", type=positive, nargs="+", default=[1, 2, 4, 8, 12], help="sessions at once")
    parser.add_argument("--first", type=positive, default=50_000, help="tokens of a session's first prompt")
    parser.add_argument("--more", type=positive, default=800, help="new prompt tokens of every further turn")
    parser.add_argument("--output", type=positive, default=500, help="tokens generated in a turn")
    parser.add_argument("--turns", type=positive, default=4, help="turns of a session")
    parser.add_argument("--repeats", type=positive, default=1, help="rows of each --concurrency")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tps-floor", type=float, default=0.0, help="asked for by every turn; 0 is none")
    parser.add_argument("--floor", type=float, default=70.0, help="the rate that turns are held against in the table")
    parser.add_argument("--max-num-batched-tokens", type=positive, help="tokens of a step; the engine's default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tensor-parallel-size", "-tp", type=positive, default=1, help="ranks, as of the server")
    for axis, argument in ARGUMENTS.items():
        parser.add_argument(FLAGS[axis], dest=argument, type=positive, help="as of the server")
    parser.add_argument("--json", type=Path, help="a file that gets a JSON line for each row: what `pareto` reads")
    parser.add_argument("--peer-user", type=float, nargs="*", default=[], help="a peer's tok/s a user, one for each C")
    parser.add_argument("--peer-output", type=float, nargs="*", default=[], help="a peer's output tok/s, likewise")


def positive(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def main(options: argparse.Namespace) -> int:
    """Print one row for each number of sessions."""
    sizes = {argument: getattr(options, argument) for argument in ARGUMENTS.values()}
    longest = options.first + options.turns * (options.more + options.output)
    config = EngineConfig(
        model=options.model,
        load_format=options.load_format,
        dtype=options.dtype,
        max_model_len=longest,
        max_num_seqs=max(options.concurrency),
        max_num_batched_tokens=options.max_num_batched_tokens,
        parallel=Parallel(world=options.tensor_parallel_size, **sizes),
    )
    asyncio.run(_run(config, options))
    return 0


async def _run(config: EngineConfig, options: argparse.Namespace) -> None:
    start = time.perf_counter()
    async with AsyncEngine(config) as engine:
        print(engine.facts.summary, f"ready in {time.perf_counter() - start:.1f} s", sep="\n", flush=True)
        sessions = Sessions(engine, options)
        first = await sessions.level(1)  # what compiles or grows on first use
        print("first session, s to the first tokens:", *(f"{turn.first:.3f}" for turn in first.turns), flush=True)
        titles = (
            "C", "tok/s a user", "output tok/s", "uncached prompt tok/s", "a minute", "with prompts",
            "first turn: TTFT", "later: TTFT p50", "p99", "turn, s", "hit", f"turns ≥ {options.floor:g} mean", "always",
            "× user", "× output",
        )  # fmt: skip
        print("|", " | ".join(titles), "|")
        print("|---" * len(titles), "|", sep="", flush=True)
        mode = "wb"  # not before the first row: an engine that does not start leaves the file as it was
        for index, concurrency in enumerate(options.concurrency):
            peers = [each[index] if index < len(each) else None for each in (options.peer_user, options.peer_output)]
            for _ in range(options.repeats):
                level = await sessions.level(concurrency)
                print(row(concurrency, level, options.floor, peers), flush=True)
                if options.json is not None:
                    with options.json.open(mode) as file:
                        file.write(msgspec.json.encode(figure(concurrency, level, config.parallel)) + b"\n")
                    mode = "ab"


def figure(concurrency: int, level: Level, parallel: Parallel) -> Figure:
    """A row's rates, and the layout that gave them as its flags."""
    given = {FLAGS[axis]: getattr(parallel, argument) for axis, argument in ARGUMENTS.items()}
    flags = [f"{flag} {size}" for flag, size in given.items() if size is not None]
    return Figure(
        concurrency=concurrency,
        output_tok_s=level.output_rate(),
        user_tok_s=level.user_rate(),
        layout=" ".join([f"-tp {parallel.world}", *flags]),
        gpus=parallel.world,
    )


def row(concurrency: int, level: Level, floor: float, peers: list[float | None]) -> str:
    """A line of the table."""
    rates = (level.user_rate(), level.output_rate())
    turns, later = level.turns, level.later
    computed = sum(turn.prompt - turn.cached for turn in turns) / level.seconds
    hit = sum(turn.cached for turn in later) / max(sum(turn.prompt for turn in later), 1)
    mean, always = level.at_floor(floor)
    cells = [
        f"{concurrency}", f"**{rates[0]:.0f}**", f"**{rates[1]:.0f}**", f"{computed:,.0f}",
        f"{60 * rates[1]:,.0f}", f"{60 * level.total_rate():,.0f}",
        f"{seconds(level.first, _first, statistics.median)} ({seconds(level.first, _first, min)}–"
        f"{seconds(level.first, _first, max)})",
        seconds(later, _first, statistics.median), seconds(later, _first, _p99),
        seconds(later, _whole, statistics.mean), f"{hit:.1%}", f"{mean:.0%}", f"{always:.0%}",
        *("–" if peer is None else f"{rate / peer:.2f}" for rate, peer in zip(rates, peers, strict=True)),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def seconds(turns: list[Turn], of: Callable[[Turn], float], by: Callable[[Iterable[float]], float]) -> str:
    """A time over turns as text, a dash without turns."""
    return f"{by([of(turn) for turn in turns]):.3f}" if turns else "–"


def _first(turn: Turn) -> float:
    return turn.first


def _whole(turn: Turn) -> float:
    return turn.whole


def _p99(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[-1 - len(ordered) // 100]
