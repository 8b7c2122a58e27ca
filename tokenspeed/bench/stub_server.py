"""The real front end before a stub engine: `python -m tokenspeed.bench.stub_server CHECKPOINT DOOR`.

The door is http, grpc, or grpc-each: there no two tokens wait for each other. Prints its port when it serves, and ends
with its standard input.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from tokenspeed.config import EngineConfig
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.engine.link import ProcessLink
from tokenspeed.entrypoints.auth import Keys
from tokenspeed.entrypoints.door import Door
from tokenspeed.entrypoints.life import SWITCH_SECONDS, Face, freeze_loaded
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.entrypoints.listen import bind
from tokenspeed.entrypoints.server import Server
from tokenspeed.logs import configure_logging


class StubLink(ProcessLink):
    """A child process that is no engine."""

    program = "tokenspeed.bench.stub_engine"


async def serve(checkpoint: str, kind: str) -> None:
    """Serve until standard input ends."""
    sys.setswitchinterval(SWITCH_SECONDS)
    engine = AsyncEngine(EngineConfig(model=checkpoint, load_format="dummy"), link=StubLink(log_level="warning"))
    door = Door(engine, keys=Keys((), ()), limits=Limits(), served_names=("stub",))
    server, port = _http(door) if kind == "http" else _grpc(door, each=kind == "grpc-each")
    await engine.start()
    await server.start()
    freeze_loaded()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    server.drain()
    await engine.stop(0.0)
    await server.close()


def _http(door: Door) -> tuple[Face, int]:
    listener = bind("127.0.0.1", 0)
    return Server(door, listener), listener.getsockname()[1]


def _grpc(door: Door, each: bool) -> tuple[Face, int]:
    from tokenspeed.entrypoints.grpc.pace import pause_beside  # noqa: PLC0415  (an extra)
    from tokenspeed.entrypoints.grpc.server import GrpcServer  # noqa: PLC0415

    server = GrpcServer(
        door.engine,
        host="127.0.0.1",
        port=0,
        keys=door.keys,
        limits=door.limits,
        metrics=door.metrics,
        pause_beside=(lambda streams: 0.0) if each else pause_beside,
    )
    return server, server.port


if __name__ == "__main__":
    configure_logging("warning", "text", role="api")
    uvloop.run(serve(*sys.argv[1:]))
