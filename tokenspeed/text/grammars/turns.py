"""Places for a few at a time, given to tenants in turn: who has many waiting holds up nobody else."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import AsyncIterator


class Turns:
    """So many `places`. A tenant's own come in the order in which they asked."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: OrderedDict[bytes, deque[asyncio.Future[None]]] = OrderedDict()

    @contextlib.asynccontextmanager
    async def place(self, tenant: bytes) -> AsyncIterator[None]:
        """Wait for a place and have it inside."""
        if self._free:
            self._free -= 1
        else:
            await self._turn(tenant)
        try:
            yield
        finally:
            self._pass_on()

    async def _turn(self, tenant: bytes) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._pass_on()  # it had just been given
            raise

    def _pass_on(self) -> None:
        """A place is free: for the tenant whose turn is longest ago."""
        while self._waiting:
            tenant, turns = self._waiting.popitem(last=False)
            while turns and turns[0].done():  # who has left costs the tenant nothing
                turns.popleft()
            if not turns:
                continue
            turns.popleft().set_result(None)
            if turns:
                self._waiting[tenant] = turns
            return
        self._free += 1
