"""POST /v1/chat/completions, POST /v1/completions, GET /v1/models."""

from __future__ import annotations

import time
from typing import Any

from aiohttp import web

from tokenspeed.engine.stream import Stream
from tokenspeed.entrypoints.answers import Answer, encode
from tokenspeed.entrypoints.answers_chat import ChatAnswer
from tokenspeed.entrypoints.answers_completion import CompletionAnswer
from tokenspeed.entrypoints.door import Door, door_of
from tokenspeed.entrypoints.generation import Generation, answer
from tokenspeed.entrypoints.schema_chat import Conversation, chat_request
from tokenspeed.entrypoints.schema_completion import completion_request
from tokenspeed.errors import InvalidRequest, ModelNotFound
from tokenspeed.text.spans import Span


async def chat_completions(request: web.Request) -> web.StreamResponse:
    """One conversation, answered by `n` assistant messages."""
    door = door_of(request)
    chat, size = await door.receive(request, chat_request)
    spans = await door.off_loop(size, render, door, chat.conversation)

    def make(id: str, streams: list[Stream]) -> Answer:
        return ChatAnswer(
            id=id,
            created=int(time.time()),
            delivery=chat.delivery,
            params=chat.params,
            prompt_token_ids=streams[0].prompt_token_ids,
            texts=door.engine.tokenizer,
        )

    return await answer(request, door, Generation("chatcmpl", [spans], chat.params, chat.delivery), make)


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

    generation = Generation("cmpl", wanted.prompts, wanted.params, wanted.delivery, wanted.shows_completion)
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


def render(door: Door, talk: Conversation) -> list[Span]:
    """The prompt of a conversation by the model's chat template."""
    template = door.engine.template
    if template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")
    return template.render(
        talk.messages,
        add_generation_prompt=talk.add_generation_prompt,
        continue_final_message=talk.continue_final_message,
        **talk.template_kwargs,
    )


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
