"""An engine process that is started again when it dies, or is not heard of any more."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from msgspec import structs

from tokenspeed.config import EngineConfig
from tokenspeed.engine.link import Heard, MortalLink, Receive
from tokenspeed.engine.messages import Failed, Lost, Ready, ToEngine

log = logging.getLogger(__name__)

WINDOW_SECONDS = 600.0
"""Restarts are counted over this time."""

LONGEST_PAUSE = 30.0

TICKS = 10
"""Looks without a message, one after another, until an engine counts as silent: this process may have been stopped
itself, which is a single long one."""


class SupervisedLink:
    """`EngineLink` over engines of `make`: the next takes the place of one that died.

    `receive` then gets `Lost` instead of `Failed`, and later the `Ready` of the next. A death is final, and `Failed`
    as ever, when the engine was never ready, when its configuration cannot work, or after `restarts` within
    `WINDOW_SECONDS`. The first restart comes at once, each further one after twice the pause.

    An engine that serves and says nothing for `silence` seconds, not even a heartbeat, is killed; 0: never.
    """

    def __init__(self, make: Callable[[], MortalLink], *, restarts: int, silence: float = 0.0) -> None:
        self._make = make
        self._restarts = restarts
        self._silence = silence
        self._spoke = False
        self._watching: asyncio.Task[None] | None = None
        self._link = make()
        self._config = EngineConfig()
        self._receive: Receive | None = None
        self._was_ready = False
        self._deaths: deque[float] = deque()
        self._started = 0
        self._restarting: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self, config: EngineConfig, receive: Receive) -> None:
        self._config, self._receive = config, receive
        await self._link.start(config, self._hear)

    def send(self, message: ToEngine) -> None:
        self._link.send(message)

    async def stop(self) -> None:
        self._stopping = True  # an engine that ends now has been told to
        self._unwatch()
        if self._restarting is not None:
            self._restarting.cancel()
            await asyncio.gather(self._restarting, return_exceptions=True)
        await self._link.stop()

    def _hear(self, message: Heard) -> None:
        assert self._receive is not None
        self._spoke = True
        match message:
            case Ready(summary=summary):
                if self._was_ready:
                    log.info("the engine serves again: %s", summary)
                self._was_ready = True
                if self._silence:
                    self._watching = asyncio.create_task(self._watch(self._link))
            case Failed():
                self._unwatch()
        match message:
            case Failed(error, config=False) if self._was_ready and not self._stopping:
                pause = self._next_pause()
                if pause is not None:
                    log.error("the engine died: %s; another one is started", error)
                    message = Lost(error)
                    self._restarting = asyncio.create_task(self._restart(pause))
                elif self._restarts:
                    error = f"{error}; {self._restarts} restarts within {WINDOW_SECONDS:.0f} s were in vain"
                    log.error("the engine is not started again: %s", error)
                    message = Failed(error, config=False)
        self._receive(message)

    async def _watch(self, link: MortalLink) -> None:
        missed = 0
        while missed < TICKS:
            self._spoke = False
            await asyncio.sleep(self._silence / TICKS)
            missed = 0 if self._spoke else missed + 1
        log.error("the engine has not been heard of for %.0f s and is killed", self._silence)
        link.kill()

    def _unwatch(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    def _next_pause(self) -> float | None:
        """Seconds to wait before the next start, None for no more."""
        now = time.monotonic()
        while self._deaths and self._deaths[0] < now - WINDOW_SECONDS:
            self._deaths.popleft()
        if len(self._deaths) >= self._restarts:
            return None
        self._deaths.append(now)
        number = len(self._deaths)
        return 0.0 if number == 1 else min(2.0 ** (number - 2), LONGEST_PAUSE)

    async def _restart(self, pause: float) -> None:
        await self._link.stop()
        await asyncio.sleep(pause)
        self._started += 1
        config = self._config
        if config.record is not None:
            config = structs.replace(config, record=f"{config.record}.{self._started}")
        self._link = self._make()
        try:
            await self._link.start(config, self._hear)
        except OSError as error:
            self._hear(Failed(f"the engine process could not be started: {error.strerror}", config=False))
