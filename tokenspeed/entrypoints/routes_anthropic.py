"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API, as Claude Code speaks it."""

from __future__ import annotations

from dataclasses import replace

from aiohttp import web
from msgspec import structs

from tokenspeed.engine.stream import Stream
from tokenspeed.entrypoints.answers import Answer, encode
from tokenspeed.entrypoints.answers_anthropic import MessagesAnswer
from tokenspeed.entrypoints.conversing import prepare, render
from tokenspeed.entrypoints.door import Door, door_of
from tokenspeed.entrypoints.generation import TENANT, Generation, answer
from tokenspeed.entrypoints.schema_anthropic import count_request, messages_request, spelled_back
from tokenspeed.entrypoints.schema_chat import Conversation
from tokenspeed.errors import ContextLengthExceeded, InvalidRequest


async def messages(request: web.Request) -> web.StreamResponse:
    """One conversation, answered by one message. A limit beyond the context is the context's end, as at Anthropic."""
    door = door_of(request)
    wanted, size = await door.receive(request, messages_request)
    chat = wanted.chat
    ready = await prepare(door, chat, size, request[TENANT])

    def make(id: str, streams: list[Stream]) -> Answer:
        return MessagesAnswer(
            id=id,
            model=chat.delivery.model,
            prompt_tokens=len(streams[0].prompt_token_ids),
            max_tokens=wanted.max_tokens,
            make_parser=ready.make_parser,
            shows_thinking=chat.include_reasoning,
        )

    generation = Generation(
        "msg_",
        [ready.prompt],
        ready.params,
        chat.delivery,
        wanted.max_tokens > 0,
        make_ending=ready.make_ending,
        turn=ready.turn,
    )
    with spelled_back():
        try:
            return await answer(request, door, generation, make)
        except ContextLengthExceeded as error:
            room = error.limit - error.prompt
            if room < 1:
                raise
            if room < (least := ready.params.min_tokens):
                raise InvalidRequest(f"min_tokens ({least}) is more than the context has room for ({room})",
                                     param="min_tokens") from None
            shorter = replace(generation, params=structs.replace(ready.params, max_tokens=room))
            return await answer(request, door, shorter, make)


async def count_tokens(request: web.Request) -> web.Response:
    """The number of tokens that the same body makes as a prompt."""
    door = door_of(request)
    talk, size = await door.receive(request, count_request)
    count = await door.off_loop(size, _count, door, talk, request[TENANT])
    return web.Response(body=encode({"input_tokens": count}), content_type="application/json")


def _count(door: Door, talk: Conversation, tenant: str) -> int:
    return len(door.engine.tokenizer.encode_spans(render(door, talk, tenant)))
