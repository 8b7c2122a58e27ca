"""The body of POST /v1/chat/completions, checked whole before anything is rendered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokenspeed.entrypoints.body import ARRAY, BOOLEAN, INTEGER, OBJECT, STRING, Fields, Kind, decode, describe
from tokenspeed.entrypoints.limits import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TEMPLATE_KWARGS_BYTES,
    MAX_TEMPLATE_KWARGS_DEPTH,
)
from tokenspeed.entrypoints.schema import (
    Delivery,
    Model,
    check_text_fits,
    delivery,
    model_name,
    refuse_unsupported,
    sampling_params,
)
from tokenspeed.errors import InvalidRequest
from tokenspeed.request import MAX_LOGPROBS, SamplingParams

Message = dict[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""Roles of this version and the role under which the template sees them."""

MESSAGE_HINTS = frozenset({"annotations", "cache_control", "id", "refusal", "status", "type"})
"""Fields of a message that clients send back and that have no effect."""

RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"}
)

_KWARGS = Kind[dict[str, Any]](dict[str, Any], "an object", shows=False)
_PARTS_TEXT = ("text", "input_text", "output_text")


@dataclass(frozen=True, slots=True)
class Conversation:
    """The part of a chat that decides its prompt; /tokenize has it too.

    `messages` hold role, content (a string) and whatever else the template may use; `unknown` names the rest.
    """

    messages: list[Message]
    template_kwargs: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    unknown: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat that can be rendered and sampled."""

    conversation: Conversation
    params: SamplingParams
    delivery: Delivery


def chat_request(body: bytes, model: Model) -> ChatRequest:
    """Parse and check, or raise a `RequestError` that names the first field at fault."""
    fields = Fields.parse(body)
    model_name(fields, model)
    refuse_unsupported(fields)
    talk = conversation(fields, model)
    params = sampling_params(fields, model, max_tokens=_max_tokens(fields), logprobs=_logprobs(fields))
    if fields.take_or("echo", BOOLEAN, False):
        raise InvalidRequest("echo is not supported for chat", param="echo")
    how = delivery(fields, model)
    if how.stream and params.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs is not available with stream: true", param="prompt_logprobs")
    return ChatRequest(talk, params, replace(how, unknown=how.unknown + talk.unknown))


def conversation(fields: Fields, model: Model) -> Conversation:
    """Read the messages and how they are rendered."""
    raw = fields.raw("messages")
    if raw is None:
        raise InvalidRequest("messages is required: an array of at least one message", param="messages")
    check_text_fits(len(raw), model, "messages")
    items = decode(raw, ARRAY, "messages") or []
    if not 1 <= len(items) <= MAX_MESSAGES:
        raise InvalidRequest(f"messages must have 1 to {MAX_MESSAGES} entries, got {len(items)}", param="messages")
    unknown: dict[str, None] = {}
    messages = [_message(bytes(item), f"messages[{index}]", unknown) for index, item in enumerate(items)]
    continues = fields.take_or("continue_final_message", BOOLEAN, False)
    add_prompt = fields.take("add_generation_prompt", BOOLEAN)
    if continues and add_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt cannot both be true", param="continue_final_message"
        )
    if continues and messages[-1]["role"] != "assistant":
        raise InvalidRequest(
            "continue_final_message needs an assistant message at the end", param="continue_final_message"
        )
    return Conversation(
        messages=messages,
        template_kwargs=_template_kwargs(fields),
        add_generation_prompt=not continues if add_prompt is None else add_prompt,
        continue_final_message=continues,
        unknown=tuple(unknown),
    )


def _message(raw: bytes, name: str, unknown: dict[str, None]) -> Message:
    """One message; names of ignored fields are added to `unknown`."""
    inner = decode(raw, OBJECT, name)
    if inner is None:
        raise InvalidRequest(f"{name} must be an object, got null", param=name)
    fields = Fields(inner, name + ".")
    role = fields.take("role", STRING)
    if role in ("tool", "function"):
        raise InvalidRequest(f"{name}: {role} messages are not supported by this version", param=f"{name}.role")
    if role not in ROLES:
        got = "nothing" if role is None else describe(fields.raw("role") or b"", shows=True)
        raise InvalidRequest(f"{name}.role must be one of {', '.join(ROLES)}, got {got}", param=f"{name}.role")
    for key in ("tool_calls", "function_call", "tool_call_id", "audio"):
        if (fields.raw(key) or b"[]") != b"[]":
            raise InvalidRequest(f"{name}.{key} is not supported by this version", param=f"{name}.{key}")
    message: Message = {"role": ROLES[role], "content": _content(fields, name, unknown)}
    for key in ("name", "reasoning_content"):
        value = fields.take(key, STRING)
        if value is not None:
            message[key] = value
    if "reasoning_content" not in message and (reasoning := fields.take("reasoning", STRING)) is not None:
        message["reasoning_content"] = reasoning
    unknown.update((f"messages[].{key}", None) for key in fields.untaken() if key not in MESSAGE_HINTS)
    return message


def _content(fields: Fields, name: str, unknown: dict[str, None]) -> str:
    """A string, or text parts joined; nothing is ever fetched."""
    where = f"{name}.content"
    raw = fields.raw("content")
    if raw is None:
        raise InvalidRequest(f"{where} is required: a string or an array of text parts", param=where)
    if raw.startswith(b'"'):
        return decode(raw, STRING, where) or ""
    if not raw.startswith(b"["):
        raise InvalidRequest(
            f"{where} must be a string or an array of text parts, got {describe(raw, shows=False)}", param=where
        )
    parts = decode(raw, ARRAY, where) or []
    if not 1 <= len(parts) <= MAX_PARTS:
        raise InvalidRequest(f"{where} must have 1 to {MAX_PARTS} parts, got {len(parts)}", param=where)
    texts: list[str] = []
    for index, part in enumerate(parts):
        parsed = decode(bytes(part), OBJECT, f"{where}[{index}]")
        if parsed is None:
            raise InvalidRequest(f"{where}[{index}] must be an object, got null", param=f"{where}[{index}]")
        inner = Fields(parsed, f"{where}[{index}].")
        kind = inner.take("type", STRING)
        if kind not in _PARTS_TEXT:
            got = "nothing" if kind is None else describe(inner.raw("type") or b"", shows=True)
            raise InvalidRequest(
                f"{inner.name('type')} must be text: this model takes text only, got {got}", param=inner.name("type")
            )
        text = inner.take("text", STRING)
        if text is None:
            raise InvalidRequest(f"{inner.name('text')} is required", param=inner.name("text"))
        texts.append(text)
        unknown.update((f"messages[].content[].{k}", None) for k in inner.untaken() if k not in MESSAGE_HINTS)
    return "".join(texts)


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    name = "chat_template_kwargs"
    raw = fields.raw(name)
    if raw is None:
        return {}
    if len(raw) > MAX_TEMPLATE_KWARGS_BYTES:
        raise InvalidRequest(f"{name} must have at most {MAX_TEMPLATE_KWARGS_BYTES} bytes", param=name)
    values = decode(raw, _KWARGS, name) or {}
    if _depth(values) > MAX_TEMPLATE_KWARGS_DEPTH:
        raise InvalidRequest(f"{name} is nested more than {MAX_TEMPLATE_KWARGS_DEPTH} levels deep", param=name)
    reserved = sorted(RESERVED_KWARGS.intersection(values))
    if reserved:
        raise InvalidRequest(f"{name} must not set {reserved[0]}", param=f"{name}.{reserved[0]}")
    return values


def _depth(value: Any) -> int:
    """Levels of nesting, counted without recursion."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _max_tokens(fields: Fields) -> int | None:
    """`max_completion_tokens`, or its old name `max_tokens`; both only when they agree."""
    new, old = fields.take("max_completion_tokens", INTEGER), fields.take("max_tokens", INTEGER)
    if new is not None and old is not None and new != old:
        raise InvalidRequest("max_tokens and max_completion_tokens differ", param="max_tokens")
    if new is not None and not 1 <= new < 2**31:
        raise InvalidRequest(
            f"max_completion_tokens must be between 1 and {2**31 - 1}, got {new}", param="max_completion_tokens"
        )
    return old if new is None else new


def _logprobs(fields: Fields) -> int | None:
    wanted = fields.take_or("logprobs", BOOLEAN, False)
    top = fields.take("top_logprobs", INTEGER)
    if top is not None:
        if not 0 <= top <= MAX_LOGPROBS:
            raise InvalidRequest(f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {top}", param="top_logprobs")
        if not wanted and top > 0:
            raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    return (top or 0) if wanted else None
