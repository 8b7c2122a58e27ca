"""Server-sent events on one connection: bounded, timed, and cheap a token.

An event is written to the transport in one call, chunk framing included: about a third of the cost of
`StreamResponse.write`. Only while the client's receive buffer is full does anybody wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import web

from tokenspeed.engine.lane import Outlet
from tokenspeed.entrypoints.limits import Limits


class SlowReader(ConnectionResetError):
    """The client did not read for too long; its connection is closed and its request aborted."""


class EventStream:
    """One 200 answer of type text/event-stream. `open` first; then `send` and `drain`; `close` last.

    `keep_alive` gives what is sent after a long silence.
    """

    def __init__(
        self, request: web.Request, limits: Limits, headers: dict[str, str], keep_alive: Callable[[], bytes]
    ) -> None:
        self._request = request
        self._connection = request.protocol
        self._limits = limits
        self._silence_filler = keep_alive
        fixed = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",  # nginx would hold tokens back
        }
        self._response = web.StreamResponse(headers={**fixed, **headers})
        self._loop = asyncio.get_running_loop()
        self._chunked = request.version >= (1, 1)
        self._last_sent = 0.0
        self._outlet: Outlet | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> Outlet:
        """Send the headers and start the keep-alive timer. Gives the way past this object."""
        if self._chunked:
            self._response.enable_chunked_encoding()
        else:
            self._response.force_close()
        await self._response.prepare(self._request)
        self._last_sent = self._loop.time()
        self._timer = self._loop.call_later(self._limits.keepalive_seconds, self._keep_alive)
        transport = self._connection.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        self._outlet = Outlet(transport, self._chunked, self._limits.write_buffer_bytes)
        return self._outlet

    def send(self, event: bytes, now: float | None = None) -> bool:
        """Write whole events. True when so much waits for the client that `drain` must be awaited.

        `now` is the loop's time, if it is known.
        """
        transport = self._connection.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the client is gone")
        transport.write(b"%x\r\n%b\r\n" % (len(event), event) if self._chunked else event)
        self._last_sent = self._loop.time() if now is None else now
        return transport.get_write_buffer_size() > self._limits.write_buffer_bytes

    async def drain(self) -> None:
        """Wait until the client has read most of what was written, or raise `SlowReader`."""
        try:
            async with asyncio.timeout(self._limits.reader_seconds):
                await self._request.writer.drain()
        except TimeoutError:
            if self._connection.transport is not None:
                self._connection.transport.abort()
            raise SlowReader("the client stopped reading") from None

    async def close(self) -> web.StreamResponse:
        """Finish the answer; the connection stays for the next request."""
        self.stop_timer()
        await self.drain()
        await self._response.write_eof()
        return self._response

    def stop_timer(self) -> None:
        """No more keep-alive comments; idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _keep_alive(self) -> None:
        last = self._last_sent if self._outlet is None else max(self._last_sent, self._outlet.last_sent)
        silent = self._loop.time() - last
        wait = self._limits.keepalive_seconds - silent
        if wait <= 0:
            transport = self._connection.transport
            if transport is None or transport.is_closing():
                return
            self.send(self._silence_filler())
            wait = self._limits.keepalive_seconds
        self._timer = self._loop.call_later(wait, self._keep_alive)
