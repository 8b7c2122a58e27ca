"""The copy engines between the device's memory and the host's: one queue a direction, a fixed bandwidth."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from tokenspeed.batch import Int32Array

NO_TICKETS: Int32Array = np.empty(0, dtype=np.int32)


class CopyEngines:
    """Copies blocks at `bytes_per_second` in each direction. What a step starts in one direction lands together."""

    def __init__(self, block_bytes: float, bytes_per_second: float) -> None:
        self._seconds = block_bytes / bytes_per_second
        self._queues: tuple[deque[tuple[float, Int32Array]], ...] = (deque(), deque())
        self._free_at = [0.0, 0.0]

    def start(self, copies: Int32Array, now: float) -> None:
        """Queue the rows (ticket, direction, from block, to block) of a step."""
        for direction, queue in enumerate(self._queues):
            tickets = copies[copies[:, 1] == direction, 0]
            if len(tickets):
                landing = max(self._free_at[direction], now) + self._seconds * len(tickets)
                self._free_at[direction] = landing
                queue.append((landing, tickets))

    def landed(self, now: float) -> Int32Array:
        """The tickets that have landed since the last call."""
        tickets = [NO_TICKETS]
        for queue in self._queues:
            while queue and queue[0][0] <= now:
                tickets.append(queue.popleft()[1])
        return np.concatenate(tickets)

    def next_landing(self) -> float:
        """When the next copies land, infinity if none are under way."""
        return min((queue[0][0] for queue in self._queues if queue), default=math.inf)
