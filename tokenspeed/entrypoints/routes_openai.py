"""POST /v1/chat/completions, POST /v1/completions, GET /v1/models."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from tokenspeed.engine.stream import Stream
from tokenspeed.entrypoints.answers import Answer, encode
from tokenspeed.entrypoints.answers_chat import ChatAnswer
from tokenspeed.entrypoints.answers_completion import CompletionAnswer
from tokenspeed.entrypoints.conversing import prepare
from tokenspeed.entrypoints.door import Door, door_of
from tokenspeed.entrypoints.generation import TENANT, Generation, answer
from tokenspeed.entrypoints.schema_chat import chat_request
from tokenspeed.entrypoints.schema_completion import completion_request
from tokenspeed.errors import ModelNotFound


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """One conversation, answered by `n` assistant messages."""
    door = door_of(request)
    chat, size = await door.receive(request, chat_request)
    ready = await prepare(door, chat, size, request[TENANT])

    def make(id: str, streams: list[Stream]) -> Answer:
        return ChatAnswer(
            id=id,
            created=int(time.time()),
            delivery=chat.delivery,
            params=ready.params,
            prompt_token_ids=streams[0].prompt_token_ids,
            texts=door.engine.tokenizer,
            make_parser=ready.make_parser,
            reasoning_fields=door.reasoning_fields if chat.include_reasoning else (),
        )

    generation = Generation(
        "chatcmpl-", [ready.prompt], ready.params, chat.delivery, make_ending=ready.make_ending, turn=ready.turn
    )
    return await answer(request, door, generation, make)


async def completions(request: web.Request) -> web.StreamResponse:
    """One or more prompts, each continued `n` times."""
    door = door_of(request)
    wanted, _ = await door.receive(request, completion_request)

    def make(id: str, streams: list[Stream]) -> Answer:
        tokenizer = door.engine.tokenizer
        texts = [
            prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip_special_tokens=False)
            for prompt in (wanted.prompts if wanted.echo else ())
        ]
        return CompletionAnswer(
            id=id,
            created=int(time.time()),
            request=wanted,
            prompt_token_ids=[stream.prompt_token_ids for stream in streams],
            prompt_texts=texts,
            texts=tokenizer,
        )

    generation = Generation("cmpl-", wanted.prompts, wanted.params, wanted.delivery, wanted.shows_completion)
    return await answer(request, door, generation, make)


async def models(request: web.Request) -> web.Response:
    """Every served name, with the context it has."""
    door = door_of(request)
    door.require_ready()
    data = [_model_json(door, name) for name in door.model.names]
    return _json({"object": "list", "data": data})


async def model(request: web.Request) -> web.Response:
    """One served name, 404 for any other."""
    door = door_of(request)
    door.require_ready()
    name = request.match_info["name"]
    if name not in door.model.names:
        raise ModelNotFound("The model named in the path does not exist", param="model", code="model_not_found")
    return _json(_model_json(door, name))


def _model_json(door: Door, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": door.created,
        "owned_by": "tokenspeed",
        "root": door.model.names[0],
        "parent": None,
        "max_model_len": door.model.max_model_len,
    }


def _json(payload: dict[str, Any]) -> web.Response:
    return web.Response(body=encode(payload), content_type="application/json")
