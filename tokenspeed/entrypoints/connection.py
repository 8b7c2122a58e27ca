"""One HTTP connection, with what aiohttp leaves out: a deadline for the first headers, JSON errors."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from tokenspeed.entrypoints.errors import HttpError, error_response, raw_error_response
from tokenspeed.entrypoints.limits import MAX_HEADER_BYTES, MAX_HEADERS, Limits

log = logging.getLogger(__name__)


class Connection(web.RequestHandler):
    """aiohttp's protocol, closing a client whose headers do not arrive in time with 408."""

    __slots__ = ("_header_timer", "_limits")

    def __init__(self, server: web.Server, loop: asyncio.AbstractEventLoop, limits: Limits) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=limits.idle_seconds,
            lingering_time=limits.linger_seconds,
            access_log=None,  # type: ignore[arg-type]
            max_line_size=MAX_HEADER_BYTES,
            max_field_size=MAX_HEADER_BYTES,
            max_headers=MAX_HEADERS,
            auto_decompress=False,
        )
        self._limits = limits
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._header_timer = self._loop.call_later(self._limits.header_seconds, self._headers_late)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.headers_arrived()
        super().connection_lost(exc)

    def headers_arrived(self) -> None:
        """A request was parsed: from here on the body's deadline and the idle time-out rule."""
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _headers_late(self) -> None:
        self._header_timer = None
        transport = self.transport
        if transport is None:
            return
        late = HttpError(408, f"No request within {self._limits.header_seconds:g} seconds", code="request_timeout")
        transport.write(raw_error_response(late, "Request Timeout"))
        transport.close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The last resort: what is not HTTP is told so, and what nobody foresaw is logged and a plain 500."""
        self.headers_arrived()
        if request.writer.output_size > 0:
            log.error("unexpected failure after the answer had begun", exc_info=exc)
            raise ConnectionError("the answer had begun; the connection is closed")
        if isinstance(exc, LineTooLong):
            error = HttpError(431, "The request line or a header is too long", code="headers_too_large")
        elif isinstance(exc, HttpProcessingError):
            error = HttpError(400, "The request is not valid HTTP", code="bad_http")
        else:
            log.error("unexpected failure in a request", exc_info=exc)
            error = HttpError(status, HTTPStatus(status).phrase, code="internal_error")
        response = error_response(error, request.path)
        response.force_close()
        return response
