"""POST /v1/responses, and GET, DELETE and POST cancel of one response."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from tokenspeed.engine.stream import Stream
from tokenspeed.entrypoints.answers import Answer, encode
from tokenspeed.entrypoints.answers_responses import ResponseAnswer
from tokenspeed.entrypoints.conversing import prepare
from tokenspeed.entrypoints.door import door_of
from tokenspeed.entrypoints.errors import HttpError
from tokenspeed.entrypoints.generation import TENANT, Generation, answer
from tokenspeed.entrypoints.responses_store import ResponseStore, item_id
from tokenspeed.entrypoints.schema_responses import responses_request
from tokenspeed.errors import InvalidRequest, RequestError

MAX_LISTED = 100
DEFAULT_LISTED = 20


class _Ended(msgspec.Struct):
    status: str


async def create(request: web.Request) -> web.StreamResponse:
    """One response, streamed or whole. Leaving aborts it, stored or not."""
    door, store = door_of(request), _store(request)
    wanted, size = await door.receive(request, partial(responses_request, stored=store), stored=store.num_bytes)
    chat = wanted.chat
    writer: ResponseAnswer | None = None

    def make(id: str, streams: list[Stream]) -> Answer:
        nonlocal writer
        writer = ResponseAnswer(
            id=id,
            model=chat.delivery.model,
            told=wanted.told,
            texts=door.engine.tokenizer,
            make_parser=ready.make_parser,
            shows_reasoning=chat.include_reasoning,
            streams=chat.delivery.stream,
            on_end=partial(store.end, id),
        )
        store.begin(id, writer.begun, wanted.items, keeps=wanted.stores, continues=wanted.continues)
        return writer

    try:
        ready = await prepare(door, chat, size, request[TENANT])
        generation = Generation(
            "resp_", [ready.prompt], ready.params, chat.delivery, make_ending=ready.make_ending, turn=ready.turn
        )
        return await answer(request, door, generation, make)
    except RequestError as error:
        if writer is not None:
            writer.failed(error)
        if isinstance(error, InvalidRequest) and error.param == "messages":
            error.param = "input"
        raise
    finally:
        if writer is not None:
            writer.abandoned()


async def retrieve(request: web.Request) -> web.Response:
    """A stored response, or one that is still being generated, as it was begun."""
    if request.query.get("stream", "false").lower() not in ("false", "0"):
        raise InvalidRequest("stream is not supported here: a response is streamed to who created it", param="stream")
    id, store = request.match_info["id"], _store(request)
    running = store.running(id)
    if running is not None:
        return _json(running.body)
    kept = store.kept(id)
    if kept is None:
        raise _not_found()
    return _json(kept.body)


async def cancel(request: web.Request) -> web.Response:
    """Abort a response that is being generated, and tell how it ended. One that was cancelled before is told again."""
    door, id, store = door_of(request), request.match_info["id"], _store(request)
    running = store.running(id)
    if running is not None:
        await door.abort(id)
        await running.ended.wait()
        if running.final:
            return _json(running.final)
    kept = store.kept(id)
    if kept is None:
        raise _not_found()
    status = msgspec.json.decode(kept.body, type=_Ended).status
    if status != "cancelled":
        raise HttpError(400, f"This response cannot be cancelled: it has ended with status {status}", code="ended")
    return _json(kept.body)


async def delete(request: web.Request) -> web.Response:
    """Forget a stored response; one that is being generated is aborted first."""
    door, id, store = door_of(request), request.match_info["id"], _store(request)
    running = store.running(id)
    if running is None and store.kept(id) is None:
        raise _not_found()
    store.delete(id)
    if running is not None:
        await door.abort(id)
        await running.ended.wait()
    return _json(encode({"id": id, "object": "response", "deleted": True}))


async def input_items(request: web.Request) -> web.Response:
    """The items from which a stored response was generated, the last one first unless `order` says asc."""
    id, store = request.match_info["id"], _store(request)
    running = store.running(id)
    entry = running if running is not None and running.keeps else store.kept(id)
    if entry is None:
        raise _not_found()
    order = request.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", param="order")
    items = list(entry.items if order == "asc" else reversed(entry.items))
    ids = [item_id(item) for item in items]
    after = request.query.get("after")
    if after is not None and after not in ids:
        raise InvalidRequest("after names no item of this response", param="after")
    start = ids.index(after) + 1 if after is not None else 0
    end = start + _limit(request)
    shown = ids[start:end]
    page: dict[str, Any] = {
        "object": "list",
        "data": [msgspec.Raw(item) for item in items[start:end]],
        "first_id": shown[0] if shown else None,
        "last_id": shown[-1] if shown else None,
        "has_more": end < len(items),
    }
    return _json(encode(page))


def _limit(request: web.Request) -> int:
    text = request.query.get("limit", str(DEFAULT_LISTED))
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_LISTED):
        raise InvalidRequest(f"limit must be between 1 and {MAX_LISTED}", param="limit")
    return int(text)


def _store(request: web.Request) -> ResponseStore:
    return door_of(request).responses.of(request[TENANT])


def _not_found() -> HttpError:
    return HttpError(
        404,
        "No response of this id is stored here: responses are stored only with store: true, and not for ever",
        code="response_not_found",
    )


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
