"""Questions that the front end asks its engine: each has a number, and is answered once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

from tokenspeed.errors import RequestError

Told = TypeVar("Told")


class Questions(Generic[Told]):
    """Those of one kind that have no answer yet."""

    def __init__(self) -> None:
        self._open: dict[int, asyncio.Future[Told]] = {}
        self._numbers = itertools.count()

    async def ask(self, send: Callable[[int], None]) -> Told:
        """Have a question of this number sent, and wait for its answer. Raises what `send` raises, or what ends all."""
        number = next(self._numbers)
        self._open[number] = asyncio.get_running_loop().create_future()
        try:
            send(number)
            return await self._open[number]
        finally:
            del self._open[number]

    def answer(self, number: int, told: Told) -> None:
        """The engine's answer; nobody may wait for it any more."""
        future = self._open.get(number)
        if future is not None and not future.done():
            future.set_result(told)

    def fail(self, error: RequestError) -> None:
        """The engine is over: nobody is left waiting for its answer."""
        for future in self._open.values():
            if not future.done():
                future.set_exception(error)
