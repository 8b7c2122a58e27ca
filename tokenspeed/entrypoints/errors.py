"""Failures as OpenAI error bodies: one mapper for every route and for what aiohttp refuses by itself."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import web

from tokenspeed.errors import RequestError

RETRY_LOADING = 5
RETRY_DRAINING = 30
RETRY_DEAD = 30
"""Seconds told in Retry-After while the engine loads, drains or is dead."""


class HttpError(RequestError):
    """A refusal that is about HTTP and not about the model: 401, 404, 405, 408, 413, 415, 431 …"""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, code=code, param=param)
        self.status = status
        self.headers = dict(headers or {})
        if status == 401:
            self.type = "authentication_error"
        elif status == 403:
            self.type = "permission_error"
        elif status >= 500:
            self.type = "server_error"


class GenerationFailed(RequestError):
    """500: the engine ended one request with an error, for example because its logits were not finite."""

    status = 500
    type = "server_error"


def error_body(error: RequestError) -> bytes:
    """`{"error": {"message", "type", "param", "code"}}`."""
    return msgspec.json.encode(
        {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}
    )


def error_response(error: RequestError) -> web.Response:
    """The whole answer for a request that got no 200, Retry-After and WWW-Authenticate included."""
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, error.retry_after))
    return web.Response(status=error.status, body=error_body(error), content_type="application/json", headers=headers)


def raw_error_response(error: RequestError, reason: str) -> bytes:
    """A complete HTTP/1.1 answer as bytes, for a connection on which no request was ever parsed."""
    body = error_body(error)
    head = (
        f"HTTP/1.1 {error.status} {reason}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


def from_http_exception(exception: web.HTTPException, path: str) -> HttpError:
    """aiohttp's own refusals (unknown route, wrong method, body over the cap …) in our shape."""
    if exception.status == 404:
        return HttpError(404, f"Unknown route {_shown_path(path)}", code="not_found")
    if isinstance(exception, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(exception.allowed_methods))
        message = f"Method {_shown_path(exception.method)} is not allowed here; allowed: {allowed}"
        return HttpError(405, message, code="method_not_allowed", headers={"Allow": allowed})
    return HttpError(exception.status, exception.reason, code=None)


def _shown_path(path: str) -> str:
    text = path if len(path) <= 100 else path[:100] + "…"
    return "".join(character if character.isprintable() else "?" for character in text)
