"""One HTTP server around one engine: bind, serve while loading, drain, end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import ssl
import stat
from pathlib import Path

from aiohttp import web

from tokenspeed.entrypoints.app import make_app
from tokenspeed.entrypoints.connection import Connection
from tokenspeed.entrypoints.door import Door
from tokenspeed.errors import ConfigError

log = logging.getLogger(__name__)

BACKLOG = 2048
LAST_WORDS_SECONDS = 5.0
"""After the engine drained: how long answers may take to reach slow clients."""


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, or `ConfigError` in one line. Comes before anything slow: a taken port shows at once."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"--port {port} is already in use on {host}") from None
        raise ConfigError(f"cannot listen on --host {host} --port {port}: {error.strerror}") from None
    listener.setblocking(False)
    return listener


def bind_unix(path: str) -> socket.socket:
    """A listening Unix socket that only this user may connect to. A socket file that nobody listens on is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_stale_socket(path):
            os.unlink(path)
        old_mask = os.umask(0o177)
        try:
            listener.bind(path)
        finally:
            os.umask(old_mask)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on --uds {path}: {error.strerror or error}") from None
    listener.setblocking(False)
    return listener


def _is_stale_socket(path: str) -> bool:
    if not Path(path).exists() or not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(path) == errno.ECONNREFUSED


class Server:
    """Serves `door` on a listening socket. `start` returns at once; requests are refused until the engine is ready."""

    def __init__(self, door: Door, listener: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        self._door = door
        self._listener = listener
        self._tls = tls
        self._runner = web.AppRunner(make_app(door), handler_cancellation=True, shutdown_timeout=LAST_WORDS_SECONDS)
        self._server: asyncio.Server | None = None
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

    async def stop(self, grace: float) -> None:
        """Refuse new requests with 503, let admitted ones end within `grace` seconds, close everything.

        The engine is stopped too: it is the one that knows when its streams have ended.
        """
        self._door.draining = True
        await self._door.engine.stop(grace)
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()
        self.stopped = True
