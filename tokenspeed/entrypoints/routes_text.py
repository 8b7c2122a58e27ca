"""POST /tokenize and /detokenize: the model's own tokenizer and chat template."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from tokenspeed.entrypoints import fields as declared
from tokenspeed.entrypoints.answers import encode, token_text
from tokenspeed.entrypoints.body import Fields
from tokenspeed.entrypoints.conversing import render
from tokenspeed.entrypoints.door import Door, door_of
from tokenspeed.entrypoints.generation import TENANT
from tokenspeed.entrypoints.limits import MAX_BYTES_A_TOKEN
from tokenspeed.entrypoints.schema import Model, check_text_fits, model_name
from tokenspeed.entrypoints.schema_chat import Conversation, conversation
from tokenspeed.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class _Tokenize:
    text: str | None
    talk: Conversation | None
    add_special_tokens: bool
    return_token_strs: bool


async def tokenize(request: web.Request) -> web.Response:
    """Token ids of a text (`prompt`) or of a rendered conversation (`messages`)."""
    door = door_of(request)
    wanted, size = await door.receive(request, _tokenize_request)
    body = await door.off_loop(size, _tokenized, door, wanted, request[TENANT])
    return web.Response(body=body, content_type="application/json")


async def detokenize(request: web.Request) -> web.Response:
    """The text of token ids, special tokens included."""
    door = door_of(request)
    ids, size = await door.receive(request, _detokenize_request)
    text = await door.off_loop(size, lambda: door.engine.tokenizer.decode(ids, skip_special_tokens=False))
    return web.Response(body=encode({"prompt": text}), content_type="application/json")


def _tokenize_request(body: bytes, model: Model) -> _Tokenize:
    fields = Fields.parse(body)
    model_name(fields, model, required=False)
    text = fields.read(declared.TEXT)
    talk = None
    if fields.raw("messages") is not None:
        if text is not None:
            raise InvalidRequest("prompt and messages exclude each other", param="prompt")
        talk = conversation(fields, model)
    elif text is None:
        raise InvalidRequest("prompt (a string) or messages is required", param="prompt")
    if text is not None:
        check_text_fits(len(text.encode()), model, "prompt")
    return _Tokenize(
        text=text,
        talk=talk,
        add_special_tokens=fields.value(declared.ADD_SPECIAL_TOKENS),
        return_token_strs=fields.value(declared.RETURN_TOKEN_STRS),
    )


def _tokenized(door: Door, wanted: _Tokenize, tenant: str) -> bytes:
    ids, tokenizer = _encode(door, wanted, tenant), door.engine.tokenizer
    strings = [token_text(tokenizer, token_id) for token_id in ids] if wanted.return_token_strs else None
    return encode(
        {"count": len(ids), "max_model_len": door.model.max_model_len, "tokens": ids, "token_strs": strings}
    )


def _encode(door: Door, wanted: _Tokenize, tenant: str) -> list[int]:
    tokenizer = door.engine.tokenizer
    if wanted.talk is not None:
        return tokenizer.encode_spans(render(door, wanted.talk, tenant))
    return tokenizer.encode(wanted.text or "", add_special_tokens=wanted.add_special_tokens, parse_special=False)


def _detokenize_request(body: bytes, model: Model) -> list[int]:
    fields = Fields.parse(body)
    model_name(fields, model, required=False)
    raw = fields.raw("tokens")
    if raw is None:
        raise InvalidRequest("tokens is required: an array of token ids", param="tokens")
    if raw.count(b",") > model.max_model_len * MAX_BYTES_A_TOKEN:
        raise InvalidRequest("tokens has too many entries", param="tokens")
    ids = fields.read(declared.TOKENS) or []
    if ids and not (min(ids) >= 0 and max(ids) < model.vocab_size):
        raise InvalidRequest(f"tokens must hold ids 0 to {model.vocab_size - 1}", param="tokens")
    return ids
