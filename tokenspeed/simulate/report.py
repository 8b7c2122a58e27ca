"""The figures of a window of virtual time, and the table that shows them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenspeed.batch import OUTPUT_RECORD
from tokenspeed.simulate.engine import Engine, TurnRecord

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Window:
    """Virtual seconds from which figures are taken: begin < t ≤ end."""

    begin: float
    end: float

    def holds(self, time: float) -> bool:
        """Whether a moment is inside."""
        return self.begin < time <= self.end

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Sample:
    """What one engine adds to the figures of a window. Seconds, tokens, tokens a second."""

    output_tokens: int
    computed_prompt_tokens: int
    prompt_tokens: int
    cached_tokens: int
    ideal_tokens: int
    ttft: list[float]
    first_turn_wait: list[float]
    unserved_sessions: int
    stream_rates: Float64Array
    """1 / mean TPOT of each turn that ended."""
    slowest_seconds: Float64Array
    """Of the same turns, tokens in the worst sliding second."""
    seconds_at_floor: float
    seconds_of_decode: float
    turn_seconds: list[float]
    preemptions: int
    refusals: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One column of the table; `docs/simulator.md` says how each is counted."""

    sessions: int
    instances: int
    floor: float
    output_tok_s: float
    computed_prompt_tok_s: float
    hit: float
    ideal_hit: float
    turns: int
    ttft_p50_s: float
    ttft_p95_s: float
    first_turn_wait_p95_s: float
    first_turns: int
    unserved_sessions: int
    stream_tok_s_p50: float
    turns_at_floor: float
    streams_above_floor: float
    seconds_above_floor: float
    turn_p95_s: float
    preemptions: int
    refusals: int
    virtual_s: float
    cpu_s: float
    speed_up: float


def percentile(values: Sequence[float] | Float64Array, percent: float) -> float:
    """The nearest-rank percentile, 0 if there are no values."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    if not len(ordered):
        return 0.0
    rank = -(-len(ordered) * percent // 100)
    return float(ordered[max(0, int(rank) - 1)])


class TokenTimes:
    """When each turn of an engine got each of its tokens: all times, grouped by turn, in order."""

    def __init__(self, engine: Engine) -> None:
        log = engine.steps
        entries = np.frombuffer(b"".join(log.records), OUTPUT_RECORD)
        lengths = [len(records) // OUTPUT_RECORD.itemsize for records in log.records]
        ends = np.repeat(np.asarray(log.ends, dtype=np.float64), lengths)
        gained = entries["num_tokens"] > 0
        ids = entries["request_id"][gained]
        order = np.argsort(ids, kind="stable")
        self.times: Float64Array = ends[gained][order]
        self.starts = np.searchsorted(ids[order], np.arange(1, len(engine.turns) + 2))
        """Turn with id i has `times[starts[i - 1] : starts[i]]`."""

    def of(self, turn: TurnRecord) -> Float64Array:
        """The times of one turn's tokens."""
        return self.times[self.starts[turn.id - 1] : self.starts[turn.id]]

    def first(self, turn: TurnRecord) -> float:
        """When its first token came, infinity if it has none."""
        begin = self.starts[turn.id - 1]
        return float(self.times[begin]) if begin < self.starts[turn.id] else math.inf


def sliding_seconds(times: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Tokens in the second after each token of a stream, and for how long that was the latest whole second.

    The first one stands for its own time too, so the durations add up to the stream's. A stream shorter than a
    second is one piece, at its mean rate. `times` has at least two tokens, the last after the first.
    """
    first, last = times[0], times[-1]
    whole = int(np.searchsorted(times, last - 1.0, side="right"))
    if whole == 0:
        return np.array([(len(times) - 1) / (last - first)]), np.array([last - first])
    tokens = np.searchsorted(times, times[:whole] + 1.0, side="right") - np.arange(1, whole + 1)
    changes = np.concatenate([[first], np.minimum(times[1 : whole + 1] + 1.0, last)])
    return tokens.astype(np.float64), np.diff(changes)


def sample(engine: Engine, window: Window, *, floor: float, preemptions: int) -> Sample:
    """What an engine that has run to the window's end adds. `preemptions` are those inside the window."""
    times = TokenTimes(engine)
    inside = (times.times > window.begin) & (times.times <= window.end)
    steps = np.asarray(engine.steps.ends)
    computed = np.asarray(engine.steps.prompt_tokens)[(steps > window.begin) & (steps <= window.end)]
    ended = [turn for turn in engine.turns if window.holds(turn.ended)]
    streams = [times.of(turn) for turn in ended if turn.output > 1]
    slowest, at_floor, decode = np.empty(len(streams)), 0.0, 0.0
    for index, stream in enumerate(streams):
        tokens, seconds = sliding_seconds(stream)
        slowest[index] = tokens.min()
        at_floor += float(seconds[tokens >= floor].sum())
        decode += float(seconds.sum())
    waiting = [
        (turn, first)
        for turn in engine.turns
        if (first := times.first(turn)) > window.begin and turn.submitted <= window.end
    ]
    # A turn that still waits at the end counts with its wait so far: otherwise the worst would count least.
    waits = [(turn, min(first, window.end) - turn.submitted) for turn, first in waiting]
    return Sample(
        output_tokens=int(inside.sum()),
        computed_prompt_tokens=int(computed.sum()),
        prompt_tokens=sum(turn.prompt for turn in ended),
        cached_tokens=sum(turn.cached for turn in ended),
        ideal_tokens=sum(turn.ideal for turn in ended),
        ttft=[wait for _, wait in waits],
        first_turn_wait=[wait for turn, wait in waits if turn.is_first],
        unserved_sessions=sum(turn.is_first and first > window.end for turn, first in waiting),
        stream_rates=np.array([(len(stream) - 1) / (stream[-1] - stream[0]) for stream in streams]),
        slowest_seconds=slowest,
        seconds_at_floor=at_floor,
        seconds_of_decode=decode,
        turn_seconds=[turn.ended - turn.submitted for turn in ended],
        preemptions=preemptions,
        refusals=sum(window.holds(time) for time in engine.refusals),
    )


def figures(
    samples: list[Sample], window: Window, *, sessions: int, floor: float, virtual_s: float, cpu_s: float
) -> Figures:
    """The engines' samples as one column."""
    prompt = max(1, sum(s.prompt_tokens for s in samples))
    ttft = [wait for s in samples for wait in s.ttft]
    firsts = [wait for s in samples for wait in s.first_turn_wait]
    rates = np.concatenate([s.stream_rates for s in samples])
    slowest = np.concatenate([s.slowest_seconds for s in samples])
    turns = [seconds for s in samples for seconds in s.turn_seconds]
    decode = sum(s.seconds_of_decode for s in samples)
    return Figures(
        sessions=sessions,
        instances=len(samples),
        floor=floor,
        output_tok_s=sum(s.output_tokens for s in samples) / window.seconds,
        computed_prompt_tok_s=sum(s.computed_prompt_tokens for s in samples) / window.seconds,
        hit=sum(s.cached_tokens for s in samples) / prompt,
        ideal_hit=sum(s.ideal_tokens for s in samples) / prompt,
        turns=len(turns),
        ttft_p50_s=percentile(ttft, 50),
        ttft_p95_s=percentile(ttft, 95),
        first_turn_wait_p95_s=percentile(firsts, 95),
        first_turns=len(firsts),
        unserved_sessions=sum(s.unserved_sessions for s in samples),
        stream_tok_s_p50=percentile(rates, 50),
        turns_at_floor=float((rates >= floor).mean()) if len(rates) else 0.0,
        streams_above_floor=float((slowest >= floor).mean()) if len(slowest) else 0.0,
        seconds_above_floor=sum(s.seconds_at_floor for s in samples) / decode if decode else 0.0,
        turn_p95_s=percentile(turns, 95),
        preemptions=sum(s.preemptions for s in samples),
        refusals=sum(s.refusals for s in samples),
        virtual_s=virtual_s,
        cpu_s=cpu_s,
        speed_up=virtual_s / cpu_s if cpu_s > 0 else 0.0,
    )


ROWS = (
    ("sessions", "sessions", "{:d}"),
    ("instances", "engines", "{:d}"),
    ("floor", "floor, tok/s", "{:g}"),
    ("output_tok_s", "output tok/s", "{:.1f}"),
    ("computed_prompt_tok_s", "uncached prompt tok/s", "{:.0f}"),
    ("hit", "hit", "{:.3f}"),
    ("ideal_hit", "ideal hit", "{:.3f}"),
    ("turns", "turns", "{:d}"),
    ("ttft_p50_s", "TTFT p50, s", "{:.2f}"),
    ("ttft_p95_s", "TTFT p95, s", "{:.2f}"),
    ("first_turn_wait_p95_s", "first-turn wait p95, s", "{:.2f}"),
    ("first_turns", "first turns", "{:d}"),
    ("unserved_sessions", "sessions without a token", "{:d}"),
    ("stream_tok_s_p50", "tok/s a user p50", "{:.1f}"),
    ("turns_at_floor", "turns ≥ floor", "{:.1%}"),
    ("streams_above_floor", "streams always ≥ floor", "{:.1%}"),
    ("seconds_above_floor", "sliding seconds ≥ floor", "{:.1%}"),
    ("turn_p95_s", "turn p95, s", "{:.1f}"),
    ("preemptions", "preemptions", "{:d}"),
    ("refusals", "refusals", "{:d}"),
    ("virtual_s", "virtual s", "{:.0f}"),
    ("cpu_s", "CPU s", "{:.2f}"),
    ("speed_up", "speed-up", "{:.0f}"),
)


def table(columns: list[Figures]) -> str:
    """A figure a line, a number of sessions a column."""
    lines = []
    for name, title, form in ROWS:
        cells = [form.format(getattr(column, name)) for column in columns]
        lines.append(f"{title:26}" + "".join(cell.rjust(10) for cell in cells))
    return "\n".join(lines)
