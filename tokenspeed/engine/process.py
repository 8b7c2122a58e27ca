"""The engine process: `python -m tokenspeed.engine.process FD LEVEL FORMAT`, started by the front end.

FD is its end of the socket pair. It receives `Start`, and serves until `Shutdown`, until the front end is
gone, or until something breaks. Exit status: 0, 2 for a configuration that cannot work, 1 for anything else.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

import uvloop

from tokenspeed.engine.messages import FromEngine, Start, ToEngine
from tokenspeed.engine.transport import Channel
from tokenspeed.errors import ConfigError
from tokenspeed.logs import configure_logging

log = logging.getLogger(__name__)


async def serve(descriptor: int, level: str, style: str) -> int:
    """Serve one engine over the socket of that descriptor; the return value is the exit status."""
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=descriptor))
    channel: Channel[ToEngine] = Channel(reader, writer, ToEngine)
    first = await channel.receive()
    if not isinstance(first, Start):
        raise ValueError(f"expected Start, got {type(first).__name__}")

    # Late: without a front end, torch need not be loaded at all.
    from tokenspeed.engine.service import EngineService  # noqa: PLC0415

    def emit(message: FromEngine) -> None:
        channel.send(message)

    service = EngineService(first.config, emit, log_style=(level, style))
    inputs = asyncio.create_task(_inputs(channel, service.handle))
    try:
        starting = asyncio.create_task(service.start())
        await asyncio.wait({starting, inputs}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            # Nobody waits for this engine any more, nothing is admitted, and the loading thread cannot be stopped.
            os._exit(0)
        try:
            await starting
        except ConfigError:
            return 2
        except Exception:
            return 1  # logged and told by the service
        serving = asyncio.create_task(service.wait())
        done, _ = await asyncio.wait({serving, inputs}, return_when=asyncio.FIRST_COMPLETED)
        if inputs in done:
            inputs.result()
        # The service has logged what broke and told the front end.
        return 1 if serving.done() and serving.exception() is not None else 0
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
    status = uvloop.run(serve(int(sys.argv[1]), level, style))
    if status:
        # A thread may wait for a rank that is gone, inside of a library that would wait for it, too.
        logging.shutdown()
        os._exit(status)


if __name__ == "__main__":
    main()
