"""The calls of `tokenspeed.grpc.scheduler.TokenSpeedScheduler`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

import grpc
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.engine.stream import Stream
from tokenspeed.entrypoints.grpc import facts
from tokenspeed.entrypoints.grpc.asked import Asked
from tokenspeed.entrypoints.grpc.cache_events import batch_message
from tokenspeed.entrypoints.grpc.pace import GATHER_SECONDS
from tokenspeed.entrypoints.grpc.tokenizer_files import chunks_of, zipped
from tokenspeed.entrypoints.grpc.told import Told
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.entrypoints.metrics import Metrics, RequestTimes
from tokenspeed.errors import CheckpointError, ConfigError, InternalError, InvalidRequest, RequestError, Unavailable
from tokenspeed.request import RequestOutput

log = logging.getLogger(__name__)

CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
}
CHILD = re.compile(r"-n\d+", re.ASCII)
"""What a gateway adds to the id of a request whose choices it sends one by one."""
IDLE_POLL_SECONDS = 0.02


class IdInUse(InvalidRequest):
    """A client's own id that is running already."""


class NotRead(RequestError):
    """408: the client has left what it was sent unread for too long."""

    status = 408


@dataclass(slots=True, eq=False)
class Call:
    """A `Generate` in progress. `writing` is since when a message has been on its way to the client.

    `aborted` ends it also if the engine does not know it yet. `stalled`: a message was on its way for too long, and
    `task` was cancelled for it.
    """

    task: asyncio.Task[Any] | None
    stream: Stream | None = None
    aborted: bool = False
    writing: float | None = None
    stalled: bool = False


class Servicer:
    """One per server; every method is a call of the protocol, named as there."""

    def __init__(
        self,
        engine: AsyncEngine,
        served_names: Sequence[str],
        metrics: Metrics,
        limits: Limits,
        pause_beside: Callable[[int], float],
    ) -> None:
        self.draining = False
        self.calls: dict[str, Call] = {}
        self._engine = engine
        self._served_names = served_names
        self._metrics = metrics
        self._limits = limits
        self._pause_beside = pause_beside
        self._bundle: bytes | None = None

    # What everything is for ----------------------------------------------------------------------------

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> None:
        """Tokens of one request. A client that goes away, or is past its deadline, cancels this."""
        try:
            await self._generate(request, context)
        except NotRead as error:
            with contextlib.suppress(grpc.aio.InternalError):  # who reads nothing may leave without reading this
                await _refuse(context, error)
        except RequestError as error:
            await _refuse(context, error)
        except grpc.aio.BaseError:
            raise
        except Exception:
            # Not a rescue: this call ends, as INTERNAL instead of UNKNOWN with the exception's own text.
            log.exception("request %s is ended", request.request_id)
            await _refuse(context, InternalError("a defect of this server ended this request; its log has the details"))

    async def _generate(self, request: pb.GenerateRequest, context: Any) -> None:
        loop = asyncio.get_running_loop()
        times = RequestTimes(self._metrics, loop.time())
        asked = Asked.of(request, self._require_ready().facts.defaults)
        if asked.request_id in self.calls:
            raise IdInUse(f"request_id {asked.request_id!r} is in use by a running request", param="request_id")
        call = self.calls[asked.request_id] = Call(asyncio.current_task())
        try:
            stream = call.stream = await self._engine.submit(
                asked.ids, asked.params, request_id=asked.request_id, texts=False, **asdict(asked.terms)
            )
            if call.aborted:
                await stream.abort()
            told = Told(asked, frozenset(self._engine.facts.eos_token_ids))
            pause = 0.0
            while outputs := await stream.batch(pause):
                self._count(times, stream, outputs, loop.time())
                for message in told.messages(outputs):
                    call.writing = loop.time()
                    await context.write(message)
                call.writing = None
                pause = self._pause_beside(len(self.calls)) if asked.stream else GATHER_SECONDS
        except asyncio.CancelledError:
            if call.stalled:  # a handler that is only cancelled would leave the client waiting for a status
                raise NotRead("the client reads nothing: this request was ended") from None
            raise
        finally:
            del self.calls[asked.request_id]
            if call.stream is not None:
                await call.stream.aclose()

    def _count(self, times: RequestTimes, stream: Stream, outputs: list[RequestOutput], now: float) -> None:
        """Metrics; raises when a choice ended with an error. Tokens that gathered came evenly, as far as we know."""
        counts: Counter[int] = Counter()
        for output in outputs:
            counts[output.index] += len(output.token_ids)
        for index, count in counts.items():
            if count:
                times.tokens(index, count, now)
        for output in outputs:
            if output.finish_reason is not None:
                times.finished(output.finish_reason, now)
                if output.finish_reason == "error":
                    raise InternalError(output.error or "the engine ended this request with an error")
                if output.index == 0 and stream.queue_seconds is not None:
                    self._metrics.queue.observe(stream.queue_seconds)

    async def Abort(self, request: pb.AbortRequest, context: Any) -> pb.AbortResponse:
        """End a request and those whose ids are its children's; one that is not running is fine."""
        wanted = request.request_id
        found = [
            id for id in self.calls if id == wanted or (id.startswith(wanted) and CHILD.fullmatch(id, len(wanted)))
        ]
        for id in found:
            self.calls[id].aborted = True
            await self._engine.abort(id)
        return pb.AbortResponse(success=True, message=f"{len(found)} running requests aborted")

    # What a gateway asks -------------------------------------------------------------------------------

    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        """From the engine's last heartbeat, at once."""
        refusal = self._unavailable()
        return pb.HealthCheckResponse(healthy=refusal is None, message="" if refusal is None else refusal.message)

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Any) -> pb.GetModelInfoResponse:
        """What the model is."""
        return facts.model(await self._ready(context), self._served_names)

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Any) -> pb.GetServerInfoResponse:
        """What runs here and how large it is."""
        return facts.server(await self._ready(context), self._served_names)

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Any) -> pb.GetLoadsResponse:
        """How busy each pool is, as of the last step or heartbeat."""
        engine = await self._ready(context)
        try:
            return facts.loads(engine, request)
        except RequestError as error:
            await _refuse(context, error)

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[common.GetTokenizerChunk]:
        """The tokenizer's files, zipped, for a gateway on another machine."""
        engine = await self._ready(context)
        if self._bundle is None:
            try:
                self._bundle = await asyncio.to_thread(zipped, engine.config)
            except CheckpointError as error:
                await _refuse(context, InternalError(str(error)))
        for chunk in chunks_of(self._bundle):
            yield chunk

    async def SubscribeKvEvents(self, request: Any, context: Any) -> AsyncIterator[common.KvEventBatch]:
        """Which KV blocks can be found, as they come and go, until the client leaves."""
        engine = await self._ready(context)
        try:
            watch = engine.watch_cache(request.start_sequence_number)
        except ConfigError as error:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, str(error))
        try:
            async for batch in watch:
                yield batch_message(batch, engine.facts.block_size)
        except RequestError as error:
            await _refuse(context, error)

    # What an administrator asks ------------------------------------------------------------------------

    async def FlushCache(self, request: common.FlushCacheRequest, context: Any) -> common.FlushCacheResponse:
        """Forget cached KV blocks, once nothing runs: after at most `timeout_s` seconds, or not at all."""
        engine = await self._ready(context)
        loop = asyncio.get_running_loop()
        until = loop.time() + request.timeout_s
        while (stats := engine.stats()).running + stats.waiting or self.calls:
            if not loop.time() < until:  # nor is there a time to wait for in a NaN
                return common.FlushCacheResponse(success=False, message="requests are running; give a timeout_s")
            await asyncio.sleep(IDLE_POLL_SECONDS)
        try:
            dropped = await engine.drop_cached()
        except RequestError as error:
            await _refuse(context, error)
        return common.FlushCacheResponse(success=True, message=f"{dropped.num_blocks} blocks freed")

    async def StartProfile(self, request: Any, context: Any) -> common.ProfileResponse:
        """There is none: steps are measured by the benchmark programs."""
        return await _no_profiler(context)

    async def StopProfile(self, request: Any, context: Any) -> common.ProfileResponse:
        """There is none: steps are measured by the benchmark programs."""
        return await _no_profiler(context)

    # Inside --------------------------------------------------------------------------------------------

    def cancel_stalled(self, now: float) -> None:
        """End calls whose clients have read nothing for too long: tokens gather for them without end."""
        for id, call in self.calls.items():
            if call.writing is not None and now - call.writing > self._limits.reader_seconds and call.task is not None:
                log.warning("request %s is ended: its client reads nothing", id)
                call.stalled = True
                call.task.cancel()

    def _unavailable(self) -> Unavailable | None:
        health = self._engine.health()
        if self.draining or health.state == "draining":
            return Unavailable("The server is shutting down")
        if health.state != "ready":
            return Unavailable(f"The engine is {health.state}")
        if health.heartbeat_age > self._limits.heartbeat_seconds:
            return Unavailable("The engine does not answer")
        return None

    def _require_ready(self) -> AsyncEngine:
        refusal = self._unavailable()
        if refusal is not None:
            raise refusal
        return self._engine

    async def _ready(self, context: Any) -> AsyncEngine:
        refusal = self._unavailable()
        if refusal is not None:
            await _refuse(context, refusal)
        return self._engine


async def _refuse(context: Any, error: RequestError) -> NoReturn:
    """End a call with the status that an error has in gRPC."""
    code = grpc.StatusCode.ALREADY_EXISTS if isinstance(error, IdInUse) else CODES[error.status]
    details = (("retry-after", str(error.retry_after)),) if error.retry_after is not None else ()
    await context.abort(code, error.message, details)
    raise AssertionError("abort returned")


async def _no_profiler(context: Any) -> NoReturn:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there is no profiler in the server: see `tokenspeed.bench`")
    raise AssertionError("abort returned")
