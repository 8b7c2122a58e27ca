"""One gRPC server around one engine, alone or beside an HTTP server of the same process."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

# Read once, at import. Our children are new programs; gRPC's hooks around a fork left one without standard input.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import grpc
from multidict import CIMultiDict
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as stubs

from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.entrypoints.auth import Keys
from tokenspeed.entrypoints.grpc.pace import pause_beside
from tokenspeed.entrypoints.grpc.servicer import Servicer
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.entrypoints.metrics import Metrics
from tokenspeed.errors import ConfigError

LAST_WORDS_SECONDS = 5.0
"""After the engine drained: how long answers may take to reach slow clients."""

STALL_POLL_SECONDS = 1.0
HEALTH = "/tokenspeed.grpc.scheduler.TokenSpeedScheduler/HealthCheck"

OPTIONS = (
    # Gateways ping idle connections as they like.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers on one port would each get some of the calls.
    ("grpc.so_reuseport", 0),
)


class KeyRequired(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Refuses calls without one of the keys: `authorization: Bearer KEY`, as over HTTP. Health is anybody's to ask."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._refusal = grpc.unary_unary_rpc_method_handler(self._refuse)

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], call: Any) -> Any:
        """The call's own handler, or one that refuses it."""
        headers = CIMultiDict((name, value) for name, value in call.invocation_metadata if isinstance(value, str))
        admitted = call.method == HEALTH or self._keys.admits(headers)
        return await continuation(call) if admitted else self._refusal

    @staticmethod
    async def _refuse(_: Any, context: Any) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "give the key as metadata: authorization: Bearer KEY")


class GrpcServer:
    """Serves an engine on `host`:`port` (0 takes a free one; `port` is then that).

    Raises `ConfigError` when the port is taken. `tls` are the files of a private key and of a certificate chain.
    `pause_beside` says how long a stream's tokens gather for a chunk beside so many streams.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        host: str,
        port: int,
        keys: Keys,
        limits: Limits,
        metrics: Metrics,
        served_names: Sequence[str] = (),
        tls: tuple[str, str] | None = None,
        pause_beside: Callable[[int], float] = pause_beside,
    ) -> None:
        self._servicer = Servicer(engine, served_names, metrics, limits, pause_beside)
        sizes = [(f"grpc.max_{way}_message_length", limits.max_message_bytes) for way in ("receive", "send")]
        self._server = grpc.aio.server(interceptors=[KeyRequired(keys)], options=[*OPTIONS, *sizes])
        self._stalls: asyncio.Task[None] | None = None
        stubs.add_TokenSpeedSchedulerServicer_to_server(self._servicer, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if tls is None:
                self.port: int = self._server.add_insecure_port(address)
            else:
                key, chain = (Path(name).read_bytes() for name in tls)
                self.port = self._server.add_secure_port(address, grpc.ssl_server_credentials([(key, chain)]))
        except RuntimeError:
            raise ConfigError(f"cannot serve gRPC on {address}: in use, or no address of this machine") from None

    async def start(self) -> None:
        """Accept calls; they are refused until the engine is ready."""
        await self._server.start()
        self._stalls = asyncio.create_task(self._end_stalled())

    async def _end_stalled(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(STALL_POLL_SECONDS)
            self._servicer.cancel_stalled(loop.time())

    def drain(self) -> None:
        """Refuse new calls."""
        self._servicer.draining = True

    async def close(self) -> None:
        """Close every connection, once answers in progress are told or `LAST_WORDS_SECONDS` are over. Idempotent."""
        if self._stalls is not None:
            self._stalls.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._stalls
            self._stalls = None
        await self._server.stop(LAST_WORDS_SECONDS)
