"""Decode steps as CUDA graphs, one pair for each number of rows in a short list."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

MAX_BUCKETS = 24


def buckets(max_rows: int) -> list[int]:
    """Numbers of rows that steps are padded to, ascending, at most `MAX_BUCKETS`, the last `max_rows`.

    1, 2, 4, 8, and from there four to each doubling, or two or one where that would be too many.
    """
    for parts in (4, 2, 1):
        sizes = [size for size in (1, 2, 4, 8) if size < max_rows]
        base = 8
        while base < max_rows:
            sizes += [size for part in range(1, parts + 1) if (size := base + base * part // parts) < max_rows]
            base *= 2
        if len(sizes) < MAX_BUCKETS:
            break
    return [*sizes, max_rows]


class Captured:
    """A piece of work that was captured: `replay` enqueues it in one call."""

    def __init__(self, work: Callable[[], None], pool: Any, stream: torch.cuda.Stream) -> None:
        """Capture `work` on `stream`; it must have run before, so that nothing is compiled or loaded in it."""
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                self._graph.capture_end()

    def replay(self) -> None:
        self._graph.replay()


class Graphs:
    """`decode(rows)` and `head(samples)` for every bucket, captured or, without `capture`, to be run as they are."""

    def __init__(self, sizes: list[int], decode: Callable[[int], None], head: Callable[[int], None]) -> None:
        self._sizes = sizes
        self._work = {"decode": decode, "head": head}
        self._captured: dict[tuple[str, int], Captured] = {}

    def __len__(self) -> int:
        return len(self._captured)

    def size(self, rows: int) -> int:
        """The least bucket that holds `rows`."""
        return next(size for size in self._sizes if size >= rows)

    def capture(self) -> None:
        """Run every piece once, for what compiles or loads on first use, then capture it. Largest first: the
        smaller ones then fit into the memory that it took."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(self._sizes):
            with torch.cuda.stream(stream):
                for work in self._work.values():
                    work(size)
            stream.synchronize()
            for name, work in self._work.items():
                self._captured[name, size] = Captured(partial(work, size), pool, stream)
        torch.cuda.current_stream().wait_stream(stream)

    def release(self) -> None:
        """Forget what was captured. Connections between GPUs that are part of a graph cannot be ended before it is."""
        self._captured.clear()

    def decode(self, rows: int) -> None:
        self._run("decode", rows)

    def head(self, samples: int) -> None:
        self._run("head", samples)

    def _run(self, name: str, size: int) -> None:
        captured = self._captured.get((name, size))
        if captured is None:
            self._work[name](size)
        else:
            captured.replay()
