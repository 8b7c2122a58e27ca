"""Metrics under the names that dashboards expect, in a registry of our own.

Counters, gauges and the distributions of steps are read from the engine when somebody asks; latencies of requests are
counted here, on the event loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from tokenspeed.engine.lane import Gaps
from tokenspeed.engine.messages import PoolStats
from tokenspeed.engine.observe import Histogram

if TYPE_CHECKING:
    from tokenspeed.engine.async_engine import AsyncEngine

PREFIX = "tokenspeed:"
LATENCY_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.0143, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
LAG_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0)


VLLM = {
    **{
        name: name
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "prompt_tokens",
            "generation_tokens",
            "num_preemptions",
            "request_success",
            "time_to_first_token_seconds",
            "inter_token_latency_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "iteration_tokens_total",
        )
    },
    "prompt_tokens_cached": "prefix_cache_hits",
}
"""Our names, and vLLM's for the same; what it has under a second name is in `_as_vllm`."""


class Metrics(Collector):
    """Everything that /metrics shows. With `vllm_model`, which gives the model's name, under vLLM's names as well."""

    def __init__(self, engine: AsyncEngine, vllm_model: Callable[[], str] | None = None) -> None:
        self._engine = engine
        self._vllm_model = vllm_model
        self.first_token = Histogram.of(LATENCY_SECONDS)
        self.inter_token = Histogram.of(TOKEN_SECONDS)
        self.gaps = Gaps(TOKEN_SECONDS)
        self.end_to_end = Histogram.of(LATENCY_SECONDS)
        self.queue = Histogram.of(LATENCY_SECONDS)
        self.loop_lag = Histogram.of(LAG_SECONDS)
        self.finished: Counter[str] = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing to say before the first scrape; keeps registration from asking the engine."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """One scrape."""
        families = [*self._gauges(), *self._counters(), *self._histograms()]
        yield from families
        if self._vllm_model is not None:
            model = self._vllm_model()
            for family in families:
                yield from _as_vllm(family, model)

    def _gauges(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        for name, text, value in (
            ("num_requests_running", "Choices that have a slot", stats.running),
            ("num_requests_waiting", "Choices that wait for one", stats.waiting),
            ("streams_below_floor", "Choices with fewer tokens in the last second than their floor",
             stats.streams_below_floor),
            ("slowest_abort_seconds", "Longest that an aborted choice kept its memory", stats.slowest_abort_seconds),
            ("slowest_abort_steps", "The same in steps that landed meanwhile", stats.slowest_abort_steps),
            ("num_sessions_resident", "Sessions whose KV blocks count as in use", stats.sessions_resident),
            ("num_sessions_waiting", "Choices whose session does not fit beside these", stats.sessions_waiting),
            ("host_blocks_used", "KV blocks in host memory", stats.host_blocks_used),
            ("kv_cache_usage_perc", "Share of KV blocks that running requests hold, 0 to 1", used),
            ("prompt_memory_bytes", "Texts and ids of earlier prompts and answers", self._engine.memory_stats().bytes),
        ):  # fmt: skip
            yield GaugeMetricFamily(PREFIX + name, text, value=value)
        yield from self._of_pools(stats.pools)

    @staticmethod
    def _of_pools(pools: list[PoolStats]) -> Iterator[Metric]:
        """Where groups of ranks have pools of their own."""
        for name, text, values in (
            ("pool_requests_running", "Choices that have a slot", [pool.running for pool in pools]),
            ("pool_requests_waiting", "Choices that wait for one", [pool.waiting for pool in pools]),
            ("pool_usage_perc", "Share of its KV blocks that running requests hold, 0 to 1",
             [pool.blocks_used / pool.blocks_total for pool in pools]),
        ):  # fmt: skip
            family = GaugeMetricFamily(PREFIX + name, f"{text}, by the pool of a group of ranks", labels=["pool"])
            for number, value in enumerate(values):
                family.add_metric([str(number)], value)
            yield family

    def _counters(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of admitted requests, cached ones included", stats.prompt_tokens),
            ("prompt_tokens_cached", "Prompt tokens found in the prefix cache", stats.cached_tokens),
            ("generation_tokens", "Generated tokens", stats.generation_tokens),
            ("num_aborts", "Choices that nobody waited for any more", stats.num_aborts),
            ("num_preemptions", "Requests that gave their blocks back to others", stats.num_preemptions),
            ("engine_restarts", "Engines that took the place of one that died", self._engine.health().restarts),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=value)
        memory = self._engine.memory_stats()
        source = CounterMetricFamily(
            PREFIX + "chat_prompt_tokens", "Tokens of rendered prompts, by where they came from", labels=["source"]
        )
        source.add_metric(["encoded"], memory.tokens_encoded)
        source.add_metric(["known"], memory.tokens_known)
        source.add_metric(["generated"], memory.tokens_generated)
        yield source
        refused = CounterMetricFamily(PREFIX + "num_refused", "Choices that were not queued", labels=["reason"])
        for reason in sorted({"queue_full", "floor", "no_room", *stats.refusals}):
            refused.add_metric([reason], stats.refusals.get(reason, 0))
        yield refused
        success = CounterMetricFamily(PREFIX + "request_success", "Choices that ended", labels=["finished_reason"])
        for reason, count in sorted(self.finished.items()):
            success.add_metric([reason], count)
        yield success

    def _histograms(self) -> Iterator[Metric]:
        steps = self._engine.step_histograms()
        self.inter_token.add(*self.gaps.take())
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From arrival to the first token", self.first_token),
            ("inter_token_latency_seconds", "Between tokens of a choice", self.inter_token),
            ("e2e_request_latency_seconds", "From arrival to the last token", self.end_to_end),
            ("request_queue_time_seconds", "Waiting in the engine's queue", self.queue),
            ("loop_lag_seconds", "How late the front end's event loop runs a timer", self.loop_lag),
            ("step_seconds", "From one landed step of the engine to the next while there is work", steps.seconds),
            ("iteration_tokens_total", "Tokens computed in a step of the engine", steps.tokens),
        ):
            yield _family(name, text, histogram)


def _family(name: str, text: str, histogram: Histogram) -> Metric:
    """The cumulative form that Prometheus reads."""
    running = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        running += count
        buckets.append((bound, running))
    family = HistogramMetricFamily(PREFIX + name, text)
    family.add_metric([], buckets, histogram.total)
    return family


def _as_vllm(family: Metric, model: str) -> Iterator[Metric]:
    """The same under vLLM's name, with the labels that its dashboards select by; nothing for what it does not have."""
    ours = family.name.removeprefix(PREFIX)
    names = [VLLM[ours]] if ours in VLLM else []
    if ours == "prompt_tokens":
        names.append("prefix_cache_queries")
    for name in names:
        copy = Metric("vllm:" + name, family.documentation, family.type)
        for sample in family.samples:
            labels = {"model_name": model, "engine": "0", **sample.labels}
            copy.add_sample(copy.name + sample.name.removeprefix(family.name), labels, sample.value)
        yield copy


class RequestTimes:
    """The clock of one request: `arrived` is when its handler began, in seconds of the event loop."""

    __slots__ = ("_arrived", "_last", "_metrics")

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics = metrics
        self._arrived = arrived
        self._last: dict[int, float] = {}

    def tokens(self, index: int, count: int, now: float) -> None:
        """`count` tokens of choice `index` came."""
        last = self._last.get(index)
        if last is None:
            if not self._last:
                self._metrics.first_token.observe(now - self._arrived)
        else:
            self._metrics.inter_token.observe((now - last) / count, count)
        self._last[index] = now

    def last(self, index: int) -> float:
        """When the last token of a choice came, or its request."""
        return self._last.get(index, self._arrived)

    def passed(self, index: int, last: float) -> None:
        """Tokens of choice `index`, the last one at `last`, came and are counted already."""
        self._last[index] = last

    def finished(self, reason: str, now: float) -> None:
        """One choice ended."""
        self._metrics.finished[reason] += 1
        self._metrics.end_to_end.observe(now - self._arrived)
