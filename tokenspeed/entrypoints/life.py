"""The life of the server process: load, announce, serve, drain, end; over HTTP, gRPC, or both."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shlex
import signal
import socket
import ssl
import sys
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

import msgspec

from tokenspeed.engine.async_engine import AsyncEngine, EngineFailed
from tokenspeed.engine.link import EngineLink, InProcessLink, ProcessLink
from tokenspeed.engine.supervisor import SupervisedLink
from tokenspeed.entrypoints.auth import Keys
from tokenspeed.entrypoints.door import Door
from tokenspeed.entrypoints.flags import ServerConfig
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.entrypoints.progress import LoadingProgress
from tokenspeed.entrypoints.server import Server
from tokenspeed.errors import ConfigError
from tokenspeed.parallel.launched import Place

log = logging.getLogger(__name__)

SWITCH_SECONDS = 0.0001
"""How soon a thread that parses or renders a large body gives way to the event loop. While 1 MB bodies were read one
after the other (two busy cores), the 25th percentile of a timer's lateness was 0.25 ms with this, 0.74 with 0.5 ms, 2.3
with Python's 5 ms, and a body took as long. The tokens of a step leave in one call without a switch (`engine/lane`)."""

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class Face(Protocol):
    """One way to reach the engine."""

    async def start(self) -> None:
        """Accept connections; requests are refused until the engine is ready."""

    def drain(self) -> None:
        """Refuse new requests; those in progress go on."""

    async def close(self) -> None:
        """Close every connection. Idempotent."""


async def serve(config: ServerConfig, listener: socket.socket | None, tls: ssl.SSLContext | None) -> int:
    """Serve until told to stop; gives the exit status. Raises `ConfigError` for a start that cannot work.

    `listener` and `tls` are HTTP's.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    progress = LoadingProgress()
    engine = AsyncEngine(config.engine, progress=progress, link=_link(config))
    door = Door(
        engine,
        keys=Keys(config.api_keys, config.admin_api_keys),
        limits=Limits(),
        served_names=config.served_names,
        allowed_origins=config.allowed_origins,
        tool_call_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
        reasoning_field=config.reasoning_field,
        metrics_compat=config.metrics_compat,
    )
    faces: list[Face] = [] if listener is None else [Server(door, listener, tls)]
    grpc_port = None if config.grpc_port is None else _grpc_face(config, config.grpc_port, door, faces)
    signals = asyncio.Semaphore(0)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, signals.release)
    stopped = False
    try:
        for face in faces:
            await face.start()
        stop = asyncio.create_task(signals.acquire())
        with progress:
            ready = await _load(engine, stop)
        if not ready:
            return 0
        freeze_loaded()
        log.info("%s", engine.facts.summary)
        if listener is not None:
            log.info("%s", door.answer_format.summary)
            _announce(config, listener, door)
        if grpc_port is not None:
            _announce_grpc(config, grpc_port, door)
        await stop
        log.info("stopping: running requests get %g s, new ones 503; once more stops at once", config.shutdown_grace)
        failed = engine.health().state == "dead"
        stopped = await _first(_stop(engine, faces, config.shutdown_grace), signals.acquire())
        if not stopped:
            return EXIT_INTERRUPTED
        return EXIT_FAILED if failed else 0
    except EngineFailed as error:
        log.error("the engine did not start: %s", error)
        return EXIT_FAILED
    finally:
        if not stopped:
            await _stop(engine, faces, 0.0)


async def _stop(engine: AsyncEngine, faces: Sequence[Face], grace: float) -> None:
    """Refuse new requests, let admitted ones end within `grace` seconds, close everything.

    After a cancelled call, another one with less grace is fine.
    """
    for face in faces:
        face.drain()
    await engine.stop(grace)  # it is the one that knows when its streams have ended
    await asyncio.gather(*(face.close() for face in faces))


def _grpc_face(config: ServerConfig, port: int, door: Door, faces: list[Face]) -> int:
    """Add the gRPC server to the faces; gives its port. Raises `ConfigError` without the packages for it."""
    try:
        from tokenspeed.entrypoints.grpc.server import GrpcServer  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError as error:
        raise ConfigError(f"gRPC needs the package {error.name}: pip install 'tokenspeed[smg]'") from None
    files = (config.ssl_keyfile, config.ssl_certfile)
    server = GrpcServer(
        door.engine,
        host=config.host,
        port=port,
        keys=door.keys,
        limits=door.limits,
        metrics=door.metrics,
        served_names=config.served_names,
        tls=(files[0], files[1]) if files[0] and files[1] else None,
    )
    faces.append(server)
    return server.port


def freeze_loaded() -> None:
    """What was loaded lives until the end: keep the collector from walking it while tokens are streamed."""
    gc.collect()
    gc.freeze()


def _link(config: ServerConfig) -> EngineLink:
    if config.in_process:
        return InProcessLink()
    # Ranks that a launcher has started end with their engine: only the launcher can start them again.
    restarts = config.engine_restarts if Place.launched(os.environ) is None else 0
    return SupervisedLink(
        lambda: ProcessLink(log_level=config.log_level, log_format=config.log_format),
        restarts=restarts,
        silence=config.engine_silence,
    )


async def _load(engine: AsyncEngine, stop: asyncio.Task[bool]) -> bool:
    """Start the engine; False when told to stop before it was ready. Raises what `AsyncEngine.start` raises."""
    loading = asyncio.create_task(engine.start())
    await asyncio.wait({loading, stop}, return_when=asyncio.FIRST_COMPLETED)
    if loading.done():
        loading.result()
        return True
    loading.cancel()
    await asyncio.gather(loading, return_exceptions=True)
    return False


async def _first(work: Coroutine[Any, Any, object], other: Coroutine[Any, Any, object]) -> bool:
    """Run both until one ends; True when `work` did. The other one is cancelled."""
    mine, theirs = asyncio.create_task(work), asyncio.create_task(other)
    await asyncio.wait({mine, theirs}, return_when=asyncio.FIRST_COMPLETED)
    if mine.done():
        theirs.cancel()
        mine.result()
        return True
    mine.cancel()
    await asyncio.gather(mine, return_exceptions=True)
    return False


def _announce(config: ServerConfig, listener: socket.socket, door: Door) -> None:
    """The address and a line to copy, on stdout."""
    scheme = "https" if config.ssl_certfile else "http"
    if config.uds:
        base, reach = f"{scheme}://localhost", f"--unix-socket {shlex.quote(config.uds)} "
    else:
        host, port = listener.getsockname()[:2]
        base, reach = f"{scheme}://{_reached(host)}:{port}", ""
    key = '-H "Authorization: Bearer $TOKENSPEED_API_KEY" ' if config.api_keys else ""
    body = {
        "model": door.model.names[0],
        "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
        "max_tokens": 64,
        "temperature": 0,
    }
    print(f"tokenspeed serves {door.model.names[0]} at {config.uds or base}; try:")
    quoted = shlex.quote(msgspec.json.encode(body).decode())
    print(f"curl {reach}{base}/v1/chat/completions {key}-H 'Content-Type: application/json' -d {quoted}", flush=True)


def _announce_grpc(config: ServerConfig, port: int, door: Door) -> None:
    """The address, and how a gateway is put before it, on stdout."""
    address = f"grpc://{_reached(config.host)}:{port}"
    print(f"tokenspeed serves {door.model.names[0]} at {address}; try:")
    print(f"smg launch --backend tokenspeed --worker-urls {address} --port 30000", flush=True)


def _reached(host: str) -> str:
    """The host as part of an address that reaches it from this machine."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{shown}]" if ":" in shown else shown
