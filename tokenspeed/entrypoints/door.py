"""What the routes share: the engine, its facts, keys, limits, metrics, and the requests in progress."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from aiohttp import web

from tokenspeed.entrypoints.auth import Keys
from tokenspeed.entrypoints.body import BodyReader
from tokenspeed.entrypoints.errors import RETRY_DEAD, RETRY_DRAINING, RETRY_LOADING
from tokenspeed.entrypoints.flags import MetricsCompat, ReasoningField
from tokenspeed.entrypoints.limits import OFF_LOOP_BYTES, Limits
from tokenspeed.entrypoints.metrics import Metrics
from tokenspeed.entrypoints.responses_store import ResponseStores
from tokenspeed.entrypoints.schema import Delivery, Model
from tokenspeed.errors import Unavailable
from tokenspeed.text.divergence import Turns
from tokenspeed.text.late_system import takes_late_system
from tokenspeed.text.parsers.choose import AUTO, AnswerFormat
from tokenspeed.text.written_calls import WrittenCalls

if TYPE_CHECKING:
    from tokenspeed.engine.async_engine import AsyncEngine
    from tokenspeed.engine.intake import EngineFacts

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_SHOWN_FIELDS = 10


@dataclass(slots=True)
class Active:
    """A request in progress: its client's own id, and the ids that its prompts have, or will have, in the engine.

    `aborted` ends those as well that the engine does not know yet.
    """

    label: str | None
    request_ids: list[str]
    aborted: bool = False


HOSTED = frozenset(
    f"tools[] of type {kind}"
    for kind in ("custom", "image_generation", "local_shell", "mcp", "namespace", "tool_search", "web_search")
)
"""Tools that agents offer in every request and that only a vendor's own servers have."""


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
        tool_call_parser: str = AUTO,
        reasoning_parser: str = AUTO,
        reasoning_field: ReasoningField = "reasoning_content",
        metrics_compat: MetricsCompat = "none",
    ) -> None:
        self.engine = engine
        self.keys = keys
        self.limits = limits
        self.bodies = BodyReader(limits)
        self.metrics = Metrics(engine, self._first_name if metrics_compat == "vllm" else None)
        self.allowed_origins = frozenset(allowed_origins)
        self.created = int(time.time())
        self.draining = False
        self.active: dict[str, Active] = {}
        self.responses = ResponseStores(limits)
        self.reasoning_fields = ("reasoning_content", "reasoning") if reasoning_field == "both" else (reasoning_field,)
        self.written_calls = WrittenCalls()
        self.turns = Turns()
        self._served_names = tuple(served_names)
        self._parsers = (tool_call_parser, reasoning_parser)
        self._model: Model | None = None
        self._facts: EngineFacts | None = None
        self._answer_format: AnswerFormat | None = None
        self._takes_late_system: bool | None = None
        self._hints_seen: set[str] = set()

    @property
    def model(self) -> Model:
        """What requests are checked against; the engine must be ready."""
        facts = self.engine.facts
        if self._model is None or facts is not self._facts:
            self._facts = facts
            self._model = Model(
                names=self._served_names or (facts.model_name,),
                max_model_len=facts.max_model_len,
                vocab_size=facts.vocab_size,
                defaults=facts.defaults,
                no_tools=self.answer_format.no_tools,
            )
        return self._model

    @property
    def answer_format(self) -> AnswerFormat:
        """How the model writes reasoning and tool calls; the engine must be ready."""
        if self._answer_format is None:
            template = self.engine.template
            sources = () if template is None else template.sources.values()
            knows_tools = template is not None and template.knows_tools
            self._answer_format = AnswerFormat.of(sources, knows_tools, *self._parsers, self.engine.facts.model_type)
        return self._answer_format

    @property
    def takes_late_system(self) -> bool:
        """Whether the model's template has a place for system messages in the midst; the engine must be ready."""
        if self._takes_late_system is None:
            template = self.engine.template
            self._takes_late_system = template is None or takes_late_system(template)
        return self._takes_late_system

    def _first_name(self) -> str:
        """The model's name where one is known: given, or found when it was loaded."""
        try:
            return self._served_names[0] if self._served_names else self.engine.facts.model_name
        except Unavailable:
            return ""

    def marker_ids(self, *, with_tools: bool) -> tuple[int, ...]:
        """The special tokens among the texts that the parsers look for."""
        tokenizer = self.engine.tokenizer
        ids = {tokenizer.control.get(text) for text in self.answer_format.markers(with_tools)}
        return tuple(sorted(id for id in ids if id in tokenizer.special_ids and id is not None))

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
        if health.state == "restarting":
            return Unavailable("The engine is being restarted", retry_after=RETRY_LOADING, code="engine_restarting")
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

    async def receive(
        self, request: web.Request, parse: Callable[[bytes, Model], T], *, stored: int = 0
    ) -> tuple[T, int]:
        """Receive and parse a body, which may refer to as many bytes `stored` here; a large one off the event loop.

        Gives the size of both, too.
        """
        self.require_ready()
        body = await self.bodies.read(request)
        self.require_ready()
        size = len(body) + stored
        return await self.off_loop(size, parse, body, self.model), size

    async def off_loop(self, size: int, work: Callable[..., T], *arguments: object) -> T:
        """Run `work` here when its input is small, in a worker thread otherwise."""
        if size < OFF_LOOP_BYTES:
            return work(*arguments)
        return await asyncio.to_thread(work, *arguments)

    async def abort(self, id: str) -> None:
        """End a request in progress, however far it is; without effect on one that has ended."""
        active = self.active.get(id)
        if active is not None:
            active.aborted = True
            for request_id in active.request_ids:
                await self.engine.abort(request_id)

    def log_ignored(self, id: str, delivery: Delivery) -> None:
        """One line for fields nobody knows, one for those put right; one a process for each hint without effect."""
        unknown = [name for name in delivery.unknown if name not in HOSTED]
        if unknown:
            names = [name[:64] for name in unknown[:MAX_SHOWN_FIELDS]]
            log.warning("warnings: request %s has fields that are unknown and ignored: %r", id, names)
        if delivery.repaired:
            names = list(delivery.repaired[:MAX_SHOWN_FIELDS])
            log.warning("warnings: request %s has malformed arguments of earlier calls, repaired: %r", id, names)
        for hint in (*delivery.hints, *(name for name in delivery.unknown if name in HOSTED)):
            if hint not in self._hints_seen:
                self._hints_seen.add(hint)
                log.info("%s: accepted, without effect (told once)", hint)


DOOR = web.AppKey("door", Door)


def door_of(request: web.Request) -> Door:
    """The door of the application that received this request."""
    return request.app[DOOR]
