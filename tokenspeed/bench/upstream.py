"""The scheduler of the `tokenspeed-scheduler` wheel in the shape of a contestant. The wheel is optional.

Its results go in as one event object a token, so making these is a part of its commit. Reading a plan's fields,
which makes lists, is left out of its time, and so is turning a prompt into a list.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from time import perf_counter_ns
from typing import Any

from tokenspeed.batch import Int32Array
from tokenspeed.bench.contestants import BLOCK_SIZE, TOKEN, BenchError, Sizes


def installed() -> str | None:
    """The version of the wheel, None if there is none."""
    try:
        return version("tokenspeed-scheduler")
    except PackageNotFoundError:
        return None


class Upstream:
    """Full attention, one cache group, prefix cache on, prefill and decode in one step, no second tier."""

    def __init__(self, sizes: Sizes) -> None:
        api: Any = importlib.import_module("tokenspeed_scheduler")
        config = api.SchedulerConfig()
        config.num_device_pages = sizes.num_blocks + 1  # the first page is never used
        config.num_snapshot_pages = 1  # nothing is retracted into host memory
        config.max_batch_size = sizes.max_rows
        config.max_scheduled_tokens = sizes.max_tokens
        config.prefix_granularity = BLOCK_SIZE
        config.disable_l2_cache = True
        config.enable_mixed_prefill_decode = True
        config.cache_groups = [api.CacheGroupConfig("kv", BLOCK_SIZE, sizes.num_blocks + 1, api.AttnKind.Full)]
        self._api = api
        self._core = api.Scheduler(config)
        self._rows = 0
        self._cached: dict[str, int] = {}

    def submit(self, request_id: int, prompt: Int32Array, max_tokens: int) -> int:
        spec = self._api.RequestSpec()
        spec.request_id = str(request_id)
        spec.tokens = prompt.tolist()
        spec.max_new_tokens = max_tokens
        start = perf_counter_ns()
        self._core.submit_requests([spec])
        return perf_counter_ns() - start

    def step(self) -> tuple[int, int]:
        start = perf_counter_ns()
        plan = self._core.next_execution_plan()
        planned = perf_counter_ns()
        results = self._read(plan)
        landed = perf_counter_ns()
        self._advance(results)
        return planned - start, perf_counter_ns() - landed

    def _read(self, plan: Any) -> list[tuple[str, list[int]]]:
        """The requests of a plan with the tokens that they sample: none in the middle of a prompt."""
        results: list[tuple[str, list[int]]] = []
        self._rows = 0
        for batch in plan.forward:
            ids = batch.request_ids
            self._rows += len(ids)
            extends = batch.num_extends()
            if extends:
                rows = zip(batch.extend_prefix_lens, batch.input_lengths, batch.prefill_lengths, strict=False)
                computed = list(rows)[:extends]
                for request_id, (prefix, new, prompt) in zip(ids, computed, strict=False):
                    self._cached.setdefault(request_id, prefix)
                    results.append((request_id, [TOKEN] if prefix + new == prompt else []))
            results += [(request_id, [TOKEN]) for request_id in ids[extends:]]
        if not self._rows:
            raise BenchError("there was nothing to plan")
        return results

    def _advance(self, results: list[tuple[str, list[int]]]) -> None:
        events = self._api.ExecutionEvent()
        for request_id, tokens in results:
            result = self._api.ForwardEvent.ExtendResult()
            result.request_id = request_id
            result.tokens = tokens
            events.add_event(result)
        self._core.advance(events)

    def finish(self, request_id: int) -> None:
        while not self._core.decoding_size():
            self.step()  # a request that has only just sampled its first token cannot be finished yet
        finish = self._api.ForwardEvent.Finish()
        finish.request_id = str(request_id)
        events = self._api.ExecutionEvent()
        events.add_event(finish)
        self._core.advance(events)
        self._core.next_execution_plan()

    def rows(self) -> int:
        return self._rows

    def waiting(self) -> int:
        return int(self._core.waiting_size())

    def cached_tokens(self, request_id: int) -> int:
        return self._cached[str(request_id)]
