"""What operators ask: /health, /ready, /health_generate, /metrics, /version; and do: /abort_request, /flush_cache."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web

from tokenspeed import __version__
from tokenspeed.entrypoints import fields as declared
from tokenspeed.entrypoints.answers import encode
from tokenspeed.entrypoints.body import Fields
from tokenspeed.entrypoints.door import door_of
from tokenspeed.entrypoints.errors import RETRY_DEAD, HttpError, error_response
from tokenspeed.entrypoints.schema import checked_label
from tokenspeed.errors import InvalidRequest, Unavailable
from tokenspeed.request import SamplingParams


async def health(request: web.Request) -> web.Response:
    """Liveness: 200 while the engine's heartbeat is heard, whatever it is busy with."""
    refusal = door_of(request).not_alive()
    return _json({"status": "alive"}) if refusal is None else error_response(refusal, request.path)


async def ready(request: web.Request) -> web.Response:
    """Readiness: 200 when a request sent now would be served."""
    refusal = door_of(request).unavailable()
    return _json({"status": "ready"}) if refusal is None else error_response(refusal, request.path)


async def health_generate(request: web.Request) -> web.Response:
    """One real token through the whole engine."""
    door = door_of(request)
    door.require_ready()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    try:
        async with asyncio.timeout(door.limits.generate_seconds):
            stream = await door.engine.submit([0], params, cache_salt="health", tps_floor=0.0)
            try:
                async for output in stream:
                    if output.finish_reason == "error":
                        raise Unavailable("The engine generated no token", retry_after=RETRY_DEAD)
            finally:
                await stream.abort()
    except TimeoutError:
        raise Unavailable(
            f"The engine generated no token within {door.limits.generate_seconds:g} seconds", retry_after=RETRY_DEAD
        ) from None
    return _json({"status": "alive"})


async def metrics(request: web.Request) -> web.Response:
    """Prometheus text."""
    body = door_of(request).metrics.text()
    return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def version(request: web.Request) -> web.Response:
    """The package's version."""
    return _json({"version": __version__})


async def abort_request(request: web.Request) -> web.Response:
    """Abort by `request_id`: an answer's own id, or a client's label (then every request that bears it).

    404 when nothing of that name runs.
    """
    door = door_of(request)
    wanted = _abort_request(await door.bodies.read(request))
    aborted = 0
    for id, active in list(door.active.items()):
        if wanted in (id, active.label):
            await door.abort(id)
            aborted += 1
    if not aborted:
        raise HttpError(404, "No running request has this request_id", code="not_found", param="request_id")
    return _json({"aborted": aborted})


async def flush_cache(request: web.Request) -> web.Response:
    """Free every KV block that is cached and that no running request holds."""
    door = door_of(request)
    door.require_ready()
    dropped = await door.engine.drop_cached()
    return _json({"dropped_blocks": dropped.num_blocks, "held_blocks": dropped.num_held})


def _abort_request(body: bytes) -> str:
    fields = Fields.parse(body)
    wanted = checked_label(fields.read(declared.ABORTED), "request_id")
    if wanted is None:
        raise InvalidRequest("request_id is required", param="request_id")
    return wanted


def _json(payload: dict[str, Any]) -> web.Response:
    return web.Response(body=encode(payload), content_type="application/json")
