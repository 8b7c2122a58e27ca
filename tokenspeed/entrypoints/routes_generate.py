"""POST /generate: text or token ids in, text and token ids out, in SGLang's words."""

from __future__ import annotations

import asyncio

from aiohttp import web

from tokenspeed.engine.stream import Stream
from tokenspeed.entrypoints.answers import Answer
from tokenspeed.entrypoints.answers_generate import GenerateAnswer
from tokenspeed.entrypoints.door import door_of
from tokenspeed.entrypoints.generation import ARRIVED, Generation, answer
from tokenspeed.entrypoints.schema_generate import generate_request
from tokenspeed.errors import InvalidRequest


async def generate(request: web.Request) -> web.StreamResponse:
    """One or more prompts, each continued `n` times."""
    door = door_of(request)
    wanted, _ = await door.receive(request, generate_request)
    clock = asyncio.get_running_loop().time

    def make(id: str, streams: list[Stream]) -> Answer:
        return GenerateAnswer(
            id=wanted.delivery.label or id,
            request=wanted,
            prompt_tokens=[len(stream.prompt_token_ids) for stream in streams],
            texts=door.engine.tokenizer,
            elapsed=lambda: clock() - request[ARRIVED],
        )

    try:
        return await answer(request, door, Generation("gen-", wanted.prompts, wanted.params, wanted.delivery), make)
    except InvalidRequest as error:
        if error.param == "prompt":
            error.param = "text" if isinstance(wanted.prompts[0], str) else "input_ids"
        raise
