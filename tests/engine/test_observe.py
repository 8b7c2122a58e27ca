"""Streams below their floor and distributions of steps, as the step loop counts them."""

from __future__ import annotations

import asyncio

from tests.engine.test_step_loop import Bench, ended
from tokenspeed.engine.observe import RATE_SECONDS, GenerationRate, Histogram, Pace


def looked_at(pace: Pace, rate: float, seconds: float, since: float = 0.0) -> list[bool]:
    """What a look every quarter of a second says while tokens come at `rate`."""
    base = pace.tokens
    seen = []
    for quarter in range(1, int(seconds * 4) + 1):
        pace.tokens = base + int(rate * quarter / 4)
        seen.append(pace.is_below(since + quarter / 4))
    return seen


def test_a_stream_at_its_floor_is_not_below_and_one_under_it_is_after_a_second() -> None:
    assert not any(looked_at(Pace(70.0), 70.0, 5.0))
    assert looked_at(Pace(70.0), 60.0, 2.0) == [False] * 4 + [True] * 4
    assert not any(looked_at(Pace(0.0), 0.0, 3.0))


def test_a_stream_that_stalls_is_below_and_recovers_within_a_second() -> None:
    pace = Pace(20.0)
    assert not any(looked_at(pace, 40.0, 2.0))
    assert looked_at(pace, 0.0, 1.5, since=2.0)[-1]
    assert not looked_at(pace, 40.0, 1.25, since=3.5)[-1]


def test_a_histogram_counts_a_bound_in_its_own_bucket_and_the_rest_in_the_last() -> None:
    histogram = Histogram.of((1.0, 2.0))
    for value, times in ((1.0, 1), (1.5, 2), (9.0, 1)):
        histogram.observe(value, times)
    assert (histogram.counts, histogram.total) == ([1, 2, 1], 13.0)


def test_what_is_generated_counts_over_the_last_seconds() -> None:
    rate = GenerationRate()
    seen = []
    for quarter in range(40):
        rate.look(quarter / 4, 10 * min(quarter, 20))
        seen.append(rate.tokens_a_second)
    assert seen[0] == 0 and seen[1:21] == [40.0] * 20, "10 in a quarter of a second"
    assert seen[24] == 20.0 and seen[20 + int(4 * RATE_SECONDS)] == 0.0
    rate.look(10.0, 190)
    assert rate.tokens_a_second == 0.0, "a stop was found ten tokens back"


def test_the_loop_counts_each_step_with_its_tokens_and_the_streams_that_are_too_slow() -> None:
    async def run() -> None:
        bench = Bench(overlap=1)
        bench.device.step_seconds = 0.01
        task = asyncio.create_task(bench.loop.run())
        bench.submit(1, length=40, max_tokens=150, tps_floor=1000.0)
        bench.submit(2, length=3, max_tokens=150, tps_floor=0.0)
        while bench.loop.stats().streams_below_floor == 0:
            bench.loop.look()
            await asyncio.sleep(0.05)
        assert bench.loop.stats().streams_below_floor == 1
        assert bench.loop.stats().generation_rate > 0
        await bench.drained()
        bench.loop.look()
        stats, histograms = bench.loop.stats(), bench.loop.histograms
        assert stats.streams_below_floor == 0
        assert sum(histograms.seconds.counts) == sum(histograms.tokens.counts) == stats.num_steps
        # Prompts and all tokens but the last are computed once, the last of each in a step that was already launched.
        assert 40 + 3 + 2 * 149 <= histograms.tokens.total <= 40 + 3 + 2 * 150
        await ended(bench, task)

    asyncio.run(run())
