"""The body of POST /v1/chat/completions, checked whole before anything is rendered."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from tokenspeed.entrypoints import fields as declared
from tokenspeed.entrypoints.body import Fields, decode
from tokenspeed.entrypoints.limits import MAX_TEMPLATE_KWARGS_BYTES, MAX_TEMPLATE_KWARGS_DEPTH
from tokenspeed.entrypoints.schema import (
    Delivery,
    Model,
    check_text_fits,
    delivery,
    model_name,
    refuse_unsupported,
    sampling_params,
)
from tokenspeed.entrypoints.schema_messages import Message, MessageReader
from tokenspeed.entrypoints.schema_tools import ToolUse, tool_use
from tokenspeed.errors import InvalidRequest
from tokenspeed.request import SamplingParams

RESERVED_KWARGS = frozenset(
    {"messages", "tools", "documents", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message"}
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """The part of a chat that decides its prompt; /tokenize has it too.

    `messages` hold role, content (a string, or None beside tool calls) and whatever else the template may use;
    `unknown` names the rest, `repaired` the arguments of earlier calls that were malformed.
    """

    messages: list[Message]
    tool_use: ToolUse
    template_kwargs: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    unknown: tuple[str, ...]
    repaired: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat that can be rendered and sampled. Without `include_reasoning` the answer leaves its reasoning out."""

    conversation: Conversation
    params: SamplingParams
    delivery: Delivery
    include_reasoning: bool


def chat_request(body: bytes, model: Model) -> ChatRequest:
    """Parse and check, or raise a `RequestError` that names the first field at fault."""
    fields = Fields.parse(body)
    model_name(fields, model)
    refuse_unsupported(fields)
    talk = conversation(fields, model)
    params = sampling_params(fields, model, max_tokens=_max_tokens(fields), logprobs=_logprobs(fields))
    if fields.value(declared.CHAT_ECHO):
        raise InvalidRequest("echo is not supported for chat", param="echo")
    include_reasoning = fields.value(declared.INCLUDE_REASONING)
    how = delivery(fields, model)
    if how.stream and params.prompt_logprobs is not None:
        raise InvalidRequest("prompt_logprobs is not available with stream: true", param="prompt_logprobs")
    how = replace(how, unknown=how.unknown + talk.unknown, repaired=talk.repaired)
    return ChatRequest(talk, params, how, include_reasoning)


def conversation(fields: Fields, model: Model) -> Conversation:
    """Read the messages, the tools, and how they are rendered."""
    raw = fields.raw("messages")
    if raw is None:
        raise InvalidRequest("messages is required: an array of at least one message", param="messages")
    check_text_fits(len(raw), model, "messages")
    reader = MessageReader()
    messages = reader.read(raw)
    use = tool_use(fields, model)
    continues = fields.value(declared.CONTINUE_FINAL_MESSAGE)
    add_prompt = fields.read(declared.ADD_GENERATION_PROMPT)
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
        tool_use=use,
        template_kwargs=template_kwargs(fields),
        add_generation_prompt=not continues if add_prompt is None else add_prompt,
        continue_final_message=continues,
        unknown=(*reader.unknown, *use.ignored),
        repaired=tuple(reader.repaired),
    )


def template_kwargs(fields: Fields) -> dict[str, Any]:
    """What the request passes on to the chat template by name."""
    name = declared.CHAT_TEMPLATE_KWARGS.name
    raw = fields.raw(name)
    if raw is None:
        return {}
    if len(raw) > MAX_TEMPLATE_KWARGS_BYTES:
        raise InvalidRequest(f"{name} must have at most {MAX_TEMPLATE_KWARGS_BYTES} bytes", param=name)
    values = decode(raw, declared.CHAT_TEMPLATE_KWARGS.kind, name) or {}
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
    new, old = fields.read(declared.MAX_COMPLETION_TOKENS), fields.read(declared.MAX_TOKENS)
    if new is not None and old is not None and new != old:
        raise InvalidRequest("max_tokens and max_completion_tokens differ", param="max_tokens")
    return old if new is None else new


def _logprobs(fields: Fields) -> int | None:
    wanted, top = fields.value(declared.LOGPROBS), fields.read(declared.TOP_LOGPROBS)
    if top and not wanted:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    return (top or 0) if wanted else None
