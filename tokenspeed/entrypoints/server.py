"""One HTTP server around one engine: serve while loading, drain, end."""

from __future__ import annotations

import asyncio
import socket
import ssl

from aiohttp import web

from tokenspeed.entrypoints.app import make_app
from tokenspeed.entrypoints.connection import Connection
from tokenspeed.entrypoints.door import Door
from tokenspeed.entrypoints.listen import BACKLOG

LAST_WORDS_SECONDS = 5.0
"""After the engine drained: how long answers may take to reach slow clients."""


class Server:
    """Serves `door` on a listening socket. `start` returns at once; requests are refused until the engine is ready."""

    def __init__(self, door: Door, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        self._door = door
        self._listener = listener
        self._tls = tls
        self._runner = web.AppRunner(make_app(door), handler_cancellation=True, shutdown_timeout=LAST_WORDS_SECONDS)
        self._server: asyncio.Server | None = None
        self._closing = False
        self.stopped = False

    async def start(self) -> None:
        """Accept connections."""
        await self._runner.setup()
        inner = self._runner.server
        assert inner is not None
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: Connection(inner, loop, self._door.limits), sock=self._listener, ssl=self._tls, backlog=BACKLOG
        )

    def drain(self) -> None:
        """Refuse new requests with 503."""
        self._door.draining = True

    async def close(self) -> None:
        """Close every connection, slow clients' after `LAST_WORDS_SECONDS`. Idempotent."""
        if self._server is not None:
            self._server.close()
        if not self._closing:
            self._closing = True
            await self._runner.cleanup()

    async def stop(self, grace: float) -> None:
        """Drain, let admitted requests end within `grace` seconds, stop the engine, close.

        The engine is the one that knows when its streams have ended.
        """
        self.drain()
        await self._door.engine.stop(grace)
        await self.close()
        self.stopped = True
