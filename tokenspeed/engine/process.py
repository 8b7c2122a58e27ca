"""The engine process: `python -m tokenspeed.engine.process SOCKET`, started by the front end.

It connects to the front end's private socket, receives `Start`, and serves until `Shutdown`, until the
front end is gone, or until something breaks. Exit status: 0, 2 for a configuration that cannot work,
1 for anything else.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable

import uvloop

from tokenspeed.engine.messages import FromEngine, Start, ToEngine
from tokenspeed.engine.transport import Channel
from tokenspeed.errors import ConfigError
from tokenspeed.logs import configure_logging

log = logging.getLogger(__name__)


async def serve(path: str) -> int:
    """Serve one engine over the socket at `path`; the return value is the exit status."""
    reader, writer = await asyncio.open_unix_connection(path)
    channel: Channel[ToEngine] = Channel(reader, writer, ToEngine)
    first = await channel.receive()
    if not isinstance(first, Start):
        raise ValueError(f"expected Start, got {type(first).__name__}")

    # Imported late, so that the socket is connected within milliseconds and torch loads after it.
    from tokenspeed.engine.service import EngineService  # noqa: PLC0415

    def emit(message: FromEngine) -> None:
        channel.send(message)

    service = EngineService(first.config, emit)
    inputs = asyncio.create_task(_inputs(channel, service.handle))
    try:
        try:
            await service.start()
        except ConfigError:
            return 2
        except Exception:
            return 1  # logged and told by the service
        served = asyncio.create_task(service.wait())
        done, _ = await asyncio.wait({served, inputs}, return_when=asyncio.FIRST_COMPLETED)
        if inputs in done:
            inputs.result()
        # The service has logged what broke and told the front end.
        return 1 if served.done() and served.exception() is not None else 0
    finally:
        inputs.cancel()
        await service.close()
        await channel.flush()
        channel.close()


async def _inputs(channel: Channel[ToEngine], handle: Callable[[ToEngine], None]) -> None:
    try:
        while True:
            handle(await channel.receive())
    except EOFError:
        log.info("the front end is gone; the engine ends")


def main() -> None:
    """Entry point of the child process."""
    # A Ctrl-C in the terminal reaches the whole process group; the front end decides when we end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    level, style = sys.argv[2], sys.argv[3]
    configure_logging(level, style, role="engine")
    sys.exit(uvloop.run(serve(sys.argv[1])))


if __name__ == "__main__":
    main()
