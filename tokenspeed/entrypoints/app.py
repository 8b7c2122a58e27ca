"""The aiohttp application: routes, and what surrounds each of them (keys, CORS, errors, one log line)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp.typedefs import Handler

from tokenspeed.entrypoints import (
    routes_anthropic,
    routes_generate,
    routes_info,
    routes_openai,
    routes_operation,
    routes_responses,
    routes_text,
)
from tokenspeed.entrypoints.connection import Connection
from tokenspeed.entrypoints.door import DOOR, Door
from tokenspeed.entrypoints.errors import error_response, from_http_exception, speaks_anthropic
from tokenspeed.entrypoints.generation import ARRIVED, TENANT
from tokenspeed.entrypoints.schema import checked_label
from tokenspeed.errors import InvalidRequest, RequestError
from tokenspeed.logs import REQUEST_ID

log = logging.getLogger(__name__)

QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics", "/v1/load", "/v1/loads"})
"""Polled by machines; their log lines are at debug level."""

ALLOWED_HEADERS = (
    "Authorization, Content-Type, X-Api-Key, X-Request-Id, X-Explain-Cache, "
    "Anthropic-Version, Anthropic-Beta, Anthropic-Dangerous-Direct-Browser-Access"
)
"""What a page of an allowed origin may send; Anthropic's client sends the last three."""

LAG_PERIOD = 1.0


def make_app(door: Door) -> web.Application:
    """All routes around one engine."""
    app = web.Application(middlewares=[_surround], client_max_size=door.limits.max_body_bytes)
    app[DOOR] = door
    app.cleanup_ctx.append(_measure_loop_lag)
    app.on_response_prepare.append(_finish_headers)
    app.add_routes(
        [
            web.post("/v1/chat/completions", routes_openai.chat_completions),
            web.post("/v1/completions", routes_openai.completions),
            web.post("/v1/messages", routes_anthropic.messages),
            web.post("/v1/messages/count_tokens", routes_anthropic.count_tokens),
            web.post("/v1/responses", routes_responses.create),
            web.get("/v1/responses/{id}", routes_responses.retrieve, allow_head=False),
            web.delete("/v1/responses/{id}", routes_responses.delete),
            web.post("/v1/responses/{id}/cancel", routes_responses.cancel),
            web.get("/v1/responses/{id}/input_items", routes_responses.input_items, allow_head=False),
            web.post("/generate", routes_generate.generate),
            web.get("/v1/models", routes_openai.models, allow_head=False),
            web.get("/v1/models/{name:.+}", routes_openai.model, allow_head=False),
            web.post("/tokenize", routes_text.tokenize),
            web.post("/detokenize", routes_text.detokenize),
            web.get("/health", routes_operation.health),
            web.get("/ready", routes_operation.ready),
            web.get("/health_generate", routes_operation.health_generate, allow_head=False),
            web.get("/metrics", routes_operation.metrics, allow_head=False),
            web.get("/version", routes_operation.version, allow_head=False),
            web.get("/v1/load", routes_info.load, allow_head=False),
            web.get("/v1/loads", routes_info.load, allow_head=False),
            web.get("/server_info", routes_info.server_info, allow_head=False),
            web.get("/get_server_info", routes_info.server_info, allow_head=False),
            web.get("/model_info", routes_info.model_info, allow_head=False),
            web.get("/get_model_info", routes_info.model_info, allow_head=False),
            web.get("/openapi.json", routes_info.openapi, allow_head=False),
            web.post("/abort_request", routes_operation.abort_request),
            web.post("/flush_cache", routes_operation.flush_cache),
            web.post("/reset_prefix_cache", routes_operation.flush_cache),
        ]
    )
    return app


@web.middleware
async def _surround(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Key, route, error shape, CORS, log line: the same for every route, unknown ones included."""
    clock = asyncio.get_running_loop().time
    request[ARRIVED] = clock()
    REQUEST_ID.set(_request_id(request))
    if isinstance(request.protocol, Connection):
        request.protocol.headers_arrived()
    door = request.app[DOOR]
    try:
        if request.method == "OPTIONS" and _allowed_origin(request, door) is not None:
            response: web.StreamResponse = web.Response(status=204)
        else:
            request[TENANT] = door.keys.check(request)
            response = await handler(request)
    except web.HTTPException as exception:
        response = error_response(from_http_exception(exception, request.path), request.path)
    except RequestError as error:
        response = error_response(error, request.path)
    if not response.prepared and (door.draining or response.status in (408, 413)):
        response.force_close()
    level = logging.DEBUG if request.path in QUIET_ROUTES else logging.INFO
    if log.isEnabledFor(level):
        id = REQUEST_ID.get()
        log.log(
            level, "%s %r %d %.3f s %s", request.method, request.path, response.status, clock() - request[ARRIVED], id
        )
    return response


def _request_id(request: web.Request) -> str:
    """The client's own id if it is fit for a header and a log line; a route that takes ids refuses one that is not."""
    with contextlib.suppress(InvalidRequest):
        label = checked_label(request.headers.get("X-Request-Id"), "X-Request-Id")
        if label is not None:
            return label
    return f"req_{uuid.uuid4().hex}"


async def _finish_headers(request: web.Request, response: web.StreamResponse) -> None:
    """For every answer, streamed ones included."""
    response.headers["Server"] = "tokenspeed"
    response.headers.setdefault("X-Request-Id", REQUEST_ID.get())
    if speaks_anthropic(request.path):
        response.headers["request-id"] = response.headers["X-Request-Id"]
    response.headers.update(_cors_headers(request))


def _cors_headers(request: web.Request) -> dict[str, str]:
    """What lets a browser page of an allowed origin read the answer; nothing for all others."""
    origin = _allowed_origin(request, request.app[DOOR])
    if origin is None:
        return {}
    shown = "X-Request-Id, X-Cache-Explanation"
    headers = {"Access-Control-Allow-Origin": origin, "Vary": "Origin", "Access-Control-Expose-Headers": shown}
    if request.method == "OPTIONS":
        headers |= {
            "Access-Control-Allow-Methods": "DELETE, GET, POST",
            "Access-Control-Allow-Headers": ALLOWED_HEADERS,
            "Access-Control-Max-Age": "600",
        }
    return headers


def _allowed_origin(request: web.Request, door: Door) -> str | None:
    origin = request.headers.get("Origin")
    if origin is None or not door.allowed_origins:
        return None
    return origin if origin in door.allowed_origins or "*" in door.allowed_origins else None


async def _measure_loop_lag(app: web.Application) -> AsyncIterator[None]:
    lag = app[DOOR].metrics.loop_lag

    async def measure() -> None:
        clock = asyncio.get_running_loop().time
        while True:
            due = clock() + LAG_PERIOD
            await asyncio.sleep(LAG_PERIOD)
            lag.observe(max(0.0, clock() - due))

    task = asyncio.create_task(measure())
    yield
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
