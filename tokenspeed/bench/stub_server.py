"""The real front end before a stub engine: `python -m tokenspeed.bench.stub_server CHECKPOINT`.

Prints its address when it serves, and ends with its standard input.
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
from tokenspeed.entrypoints.life import SWITCH_SECONDS, freeze_loaded
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.entrypoints.listen import bind
from tokenspeed.entrypoints.server import Server
from tokenspeed.logs import configure_logging


class StubLink(ProcessLink):
    """A child process that is no engine."""

    program = "tokenspeed.bench.stub_engine"


async def serve(checkpoint: str) -> None:
    """Serve until standard input ends."""
    sys.setswitchinterval(SWITCH_SECONDS)
    listener = bind("127.0.0.1", 0)
    engine = AsyncEngine(EngineConfig(model=checkpoint, load_format="dummy"), link=StubLink(log_level="warning"))
    door = Door(engine, keys=Keys((), ()), limits=Limits(), served_names=("stub",))
    server = Server(door, listener)
    await engine.start()
    await server.start()
    freeze_loaded()
    print(listener.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0.0)


if __name__ == "__main__":
    configure_logging("warning", "text", role="api")
    uvloop.run(serve(sys.argv[1]))
