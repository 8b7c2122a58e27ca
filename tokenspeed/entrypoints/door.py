"""What the routes share: the engine, its facts, keys, limits, metrics, and the requests in progress."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from aiohttp import web

from tokenspeed.engine.stream import Stream
from tokenspeed.entrypoints.auth import Keys
from tokenspeed.entrypoints.body import BodyReader
from tokenspeed.entrypoints.errors import RETRY_DEAD, RETRY_DRAINING, RETRY_LOADING
from tokenspeed.entrypoints.limits import OFF_LOOP_BYTES, Limits
from tokenspeed.entrypoints.metrics import Metrics
from tokenspeed.entrypoints.schema import HINTS, Delivery, Model
from tokenspeed.errors import Unavailable

if TYPE_CHECKING:
    from tokenspeed.engine.async_engine import AsyncEngine

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_SHOWN_FIELDS = 10


class Door:
    """One per server. `draining` refuses new requests while those in `active` end."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        keys: Keys,
        limits: Limits,
        served_names: Sequence[str] = (),
        allowed_origins: Sequence[str] = (),
    ) -> None:
        self.engine = engine
        self.keys = keys
        self.limits = limits
        self.bodies = BodyReader(limits)
        self.metrics = Metrics(engine)
        self.allowed_origins = frozenset(allowed_origins)
        self.created = int(time.time())
        self.draining = False
        self.active: dict[str, tuple[str | None, list[Stream]]] = {}
        self._served_names = tuple(served_names)
        self._model: Model | None = None
        self._hints_seen: set[str] = set()

    @property
    def model(self) -> Model:
        """What requests are checked against; the engine must be ready."""
        if self._model is None:
            facts = self.engine.facts
            self._model = Model(
                names=self._served_names or (facts.model_name,),
                max_model_len=facts.max_model_len,
                vocab_size=facts.vocab_size,
                defaults=facts.defaults,
            )
        return self._model

    def unavailable(self) -> Unavailable | None:
        """Why no request can be served now, None when one can."""
        health = self.engine.health()
        if self.draining or health.state == "draining":
            return Unavailable("The server is shutting down", retry_after=RETRY_DRAINING, code="draining")
        return self.not_alive()

    def not_alive(self) -> Unavailable | None:
        """Why the engine does not run, None when it does; a server that drains is alive."""
        health = self.engine.health()
        if health.state == "loading":
            return Unavailable("The model is still loading", retry_after=RETRY_LOADING, code="loading")
        if health.state == "dead":
            return Unavailable("The engine is not running", retry_after=RETRY_DEAD, code="engine_dead")
        if health.heartbeat_age > self.limits.heartbeat_seconds:
            return Unavailable("The engine does not answer", retry_after=RETRY_DEAD, code="engine_silent")
        return None

    def require_ready(self) -> None:
        """Raise `Unavailable` unless requests can be served."""
        refusal = self.unavailable()
        if refusal is not None:
            raise refusal

    async def receive(self, request: web.Request, parse: Callable[[bytes, Model], T]) -> tuple[T, int]:
        """Receive and parse a body; a large one off the event loop. Gives the body's size too."""
        self.require_ready()
        body = await self.bodies.read(request)
        self.require_ready()
        return await self.off_loop(len(body), parse, body, self.model), len(body)

    async def off_loop(self, size: int, work: Callable[..., T], *arguments: object) -> T:
        """Run `work` here when its input is small, in a worker thread otherwise."""
        if size < OFF_LOOP_BYTES:
            return work(*arguments)
        return await asyncio.to_thread(work, *arguments)

    def log_ignored(self, id: str, delivery: Delivery) -> None:
        """One line for fields nobody knows; one line a process for each hint without effect."""
        if delivery.unknown:
            names = [name[:64] for name in delivery.unknown[:MAX_SHOWN_FIELDS]]
            log.warning("warnings: request %s has fields that are unknown and ignored: %r", id, names)
        for hint in delivery.hints:
            if hint in HINTS and hint not in self._hints_seen:
                self._hints_seen.add(hint)
                log.info("the field %s is accepted and has no effect (told once)", hint)


DOOR = web.AppKey("door", Door)


def door_of(request: web.Request) -> Door:
    """The door of the application that received this request."""
    return request.app[DOOR]
