"""Failures as error bodies, OpenAI's or Anthropic's: one mapper for all routes and for aiohttp's own refusals."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from aiohttp import web

from tokenspeed.errors import ContextLengthExceeded, RequestError
from tokenspeed.logs import REQUEST_ID

RETRY_LOADING = 5
RETRY_DRAINING = 30
RETRY_DEAD = 30
"""Seconds told in Retry-After while the engine loads, drains or is dead."""

ANTHROPIC_ROUTE = "/v1/messages"

_ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""By status; any other one is an `invalid_request_error` below 500 and an `api_error` from there on."""


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


def speaks_anthropic(path: str) -> bool:
    """Whether clients of a route expect Anthropic's errors and headers."""
    return path == ANTHROPIC_ROUTE or path.startswith(ANTHROPIC_ROUTE + "/")


def anthropic_error_body(error: RequestError) -> bytes:
    """`{"type": "error", "error": {"type", "message"}, "request_id"}`; the message names the field."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    message = error.message
    if isinstance(error, ContextLengthExceeded):
        message = f"prompt is too long: {error.prompt} tokens > {error.limit} maximum"
    elif error.param is not None and error.param not in message:
        message = f"{error.param}: {message}"
    told = {"type": kind, "message": message}
    return msgspec.json.encode({"type": "error", "error": told, "request_id": REQUEST_ID.get()})


def error_response(error: RequestError, path: str) -> web.Response:
    """The whole answer of a route that gave no 200, Retry-After and WWW-Authenticate included."""
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, error.retry_after))
    body = anthropic_error_body(error) if speaks_anthropic(path) else error_body(error)
    return web.Response(status=error.status, body=body, content_type="application/json", headers=headers)


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
