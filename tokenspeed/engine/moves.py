"""The grammars of one step's rows, moved on by its tokens: few cheap ones at once, many or dear ones in threads.

In threads the loop goes on meanwhile: heartbeats, aborts and new requests need not wait for a hostile grammar. Either
way the masks are the same. A thread holds no interpreter lock while xgrammar computes.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tokenspeed.engine.grammars import Constraint

Move = tuple[Constraint, int]

AT_ONCE_SECONDS = 0.001
"""Moves that are expected to take no more together are made where the step lands: 22 rows of 45 µs. A thread would
cost them 0.1 ms."""

THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))


class Moves:
    """Makes the moves of one step at a time. Its threads end with it."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None

    async def make(self, moves: Sequence[Move]) -> None:
        """Return when all have been made. Each constraint moves once; nothing else looks at it meanwhile."""
        expected = sum(constraint.seconds for constraint, _ in moves)
        if expected <= AT_ONCE_SECONDS:
            for constraint, token in moves:
                constraint.move(token)
            return
        self._threads = self._threads or ThreadPoolExecutor(THREADS, thread_name_prefix="tokenspeed-masks")
        loop, left = asyncio.get_running_loop(), deque(moves)
        workers = min(THREADS, len(moves), 1 + int(expected / AT_ONCE_SECONDS))
        await asyncio.gather(*(loop.run_in_executor(self._threads, _make_all, left) for _ in range(workers)))


def _make_all(left: deque[Move]) -> None:
    """Make moves until none is left: several threads take from the same ones, so that a dear row holds up only one."""
    while True:
        try:
            constraint, token = left.popleft()
        except IndexError:
            return
        constraint.move(token)
