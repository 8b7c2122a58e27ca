"""The bodies of POST /v1/messages and /v1/messages/count_tokens: Anthropic's fields, read as those of a chat.

What is spelled differently is translated, so that one schema checks it for all routes; errors are translated back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from msgspec import structs

from tokenspeed.entrypoints import fields as declared
from tokenspeed.entrypoints.body import ARRAY, BOOLEAN, INTEGER, OBJECT, STRING, Fields, decode, describe
from tokenspeed.entrypoints.limits import MAX_CACHE_KEY_CHARS, MAX_TOOLS_BYTES
from tokenspeed.entrypoints.schema import Model, check_text_fits, delivery, model_name, sampling_params
from tokenspeed.entrypoints.schema_anthropic_messages import BlockReader
from tokenspeed.entrypoints.schema_chat import ChatRequest, Conversation, template_kwargs
from tokenspeed.entrypoints.schema_grammar import described_schema
from tokenspeed.entrypoints.schema_tools import ToolUse, tool_use
from tokenspeed.errors import InvalidRequest
from tokenspeed.request import Grammar

HINTS = frozenset(
    {
        "anthropic_beta",
        "anthropic_version",
        "betas",
        "container",
        "context_management",
        "diagnostics",
        "inference_geo",
        "output_config.effort",
        "speed",
        "user_profile_id",
    }
)
"""Fields of this route alone that have no effect here, beside those of `schema.HINTS`."""

NOT_HERE: Mapping[str, tuple[bytes, ...]] = {
    "echo": (b"false",),
    "logprobs": (b"false",),
    "max_completion_tokens": (),
    "n": (b"1",),
    "parallel_tool_calls": (b"true",),
    "prompt_logprobs": (),
    "return_token_ids": (b"false",),
    "stop": (b"[]",),
    "stream_options": (),
    "top_logprobs": (b"0",),
}
"""Fields of the other routes for whose effect Anthropic's message has no place, with the values that ask for none."""

TOOL_HINTS = frozenset({"allowed_callers", "eager_input_streaming", "input_examples"})
"""Fields of a tool that have no effect, beside those that other routes know."""

CHOICES = {"auto": b'"auto"', "any": b'"required"', "none": b'"none"'}
THINKING = {"enabled": True, "adaptive": None, "between_tools": None, "disabled": False}
"""What each type sets a template's switch to; None leaves it to the template."""

SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates are told whether to think; those that know neither are not changed by them."""

SESSION = re.compile(r"_session_([0-9A-Za-z-]+)$")
"""How Claude Code named its session in `metadata.user_id` before that became JSON."""

_SPELLED_BACK = (
    (re.compile(r"(tools\[\d+\])\.parameters"), r"\1.input_schema"),
    (re.compile(r"\bparallel_tool_calls\b"), "tool_choice.disable_parallel_tool_use"),
    (re.compile(r"^stop$"), "stop_sequences"),
)


@dataclass(frozen=True, slots=True)
class MessagesRequest:
    """A chat and what only Anthropic's answer needs: the limit as it was asked for, of which 0 fills the cache only."""

    chat: ChatRequest
    max_tokens: int


def messages_request(body: bytes, model: Model) -> MessagesRequest:
    """Parse and check, or raise a `RequestError` that names the first field at fault."""
    fields = Fields.parse(body)
    model_name(fields, model)
    talk = _conversation(fields, model)
    max_tokens = fields.read(declared.MESSAGES_MAX_TOKENS)
    if max_tokens is None:
        raise InvalidRequest("max_tokens is required: an integer", param="max_tokens")
    shows_thinking = _shows_thinking(fields)
    session = _session(fields)
    ignored = _without_effect(fields)
    grammar = _format(fields)
    with spelled_back():
        rest = _translated(fields)
        params = sampling_params(rest, model, max_tokens=max_tokens, logprobs=None, min_max_tokens=0)
        how = delivery(rest, model)
    if max_tokens == 0 and params.min_tokens > 0:
        raise InvalidRequest("min_tokens must be 0 with max_tokens 0", param="min_tokens")
    if grammar is not None:
        if params.grammar is not None:
            raise InvalidRequest(f"{grammar.field} cannot be combined with {params.grammar.field}", param=grammar.field)
        params = structs.replace(params, grammar=grammar)
    names = (*how.unknown, *ignored)
    how = replace(
        how,
        prompt_cache_key=how.prompt_cache_key or session,
        hints=(*how.hints, *(name for name in names if name in HINTS)),
        unknown=(*(name for name in names if name not in HINTS), *talk.unknown),
        repaired=talk.repaired,
    )
    return MessagesRequest(ChatRequest(talk, params, how, include_reasoning=shows_thinking), max_tokens)


def count_request(body: bytes, model: Model) -> Conversation:
    """The conversation whose tokens are counted; of the other fields none matters."""
    fields = Fields.parse(body)
    model_name(fields, model)
    return _conversation(fields, model)


def _conversation(fields: Fields, model: Model) -> Conversation:
    raw = fields.raw("messages")
    if raw is None:
        raise InvalidRequest("messages is required: an array of at least one message", param="messages")
    check_text_fits(len(raw), model, "messages")
    check_text_fits(len(fields.raw("system") or b""), model, "system")
    system, reader = BlockReader(root="system"), BlockReader()
    messages = reader.read(raw, system=system.system(fields))
    continues = messages[-1]["role"] == "assistant"
    use = _tool_use(fields, model)
    return Conversation(
        messages=messages,
        tool_use=use,
        template_kwargs=_switches(fields) | template_kwargs(fields),
        add_generation_prompt=not continues,
        continue_final_message=continues,
        unknown=(*system.unknown, *reader.unknown, *use.ignored),
        repaired=tuple(reader.repaired),
    )


def _tool_use(fields: Fields, model: Model) -> ToolUse:
    """`tools` and `tool_choice` as a chat's."""
    chat = {"tools": _tools(fields) or b"null", **_tool_choice(fields)}
    with spelled_back():
        return tool_use(Fields({key: msgspec.Raw(raw) for key, raw in chat.items()}), model, flat=True)


def _tools(fields: Fields) -> bytes | None:
    """Tools of the client's own are functions; those of Anthropic's servers keep their type, and are left out by it."""
    raw = fields.raw("tools")
    if raw is None or len(raw) > MAX_TOOLS_BYTES:
        return raw
    made: list[Mapping[str, msgspec.Raw] | None] = []
    items = decode(raw, ARRAY, "tools") or []
    for index, item in enumerate(items):
        name = f"tools[{index}]"
        tool = decode(bytes(item), OBJECT, name)
        if tool is not None and Fields(tool, f"{name}.").take_or("type", STRING, "custom") == "custom":
            described = {key: value for key, value in tool.items() if key not in TOOL_HINTS}
            schema = described.pop("input_schema", msgspec.Raw(b"null"))
            tool = {**described, "type": msgspec.Raw(b'"function"'), "parameters": schema}
        made.append(tool)
    return msgspec.json.encode(made)


def _tool_choice(fields: Fields) -> dict[str, bytes]:
    wanted = fields.read(declared.MESSAGES_TOOL_CHOICE)
    if wanted is None:
        return {}
    inner = Fields(wanted, "tool_choice.")
    kind = inner.take("type", STRING)
    chosen: dict[str, bytes] = {}
    if kind == "tool":
        name = inner.take("name", STRING)
        if name is None:
            raise InvalidRequest("tool_choice.name is required: a string", param="tool_choice.name")
        chosen["tool_choice"] = msgspec.json.encode({"type": "function", "name": name})
    elif kind in CHOICES:
        chosen["tool_choice"] = CHOICES[kind]
    else:
        raise _not_among("tool_choice.type", (*CHOICES, "tool"), inner.raw("type"))
    if inner.take_or("disable_parallel_tool_use", BOOLEAN, False):
        chosen["parallel_tool_calls"] = b"false"
    return chosen


def _switches(fields: Fields) -> dict[str, Any]:
    """What `thinking` sets for the template."""
    wanted = fields.read(declared.THINKING)
    if wanted is None:
        return {}
    inner = Fields(wanted, "thinking.")
    kind = inner.take("type", STRING)
    if kind not in THINKING:
        raise _not_among("thinking.type", tuple(THINKING), inner.raw("type"))
    inner.take("budget_tokens", INTEGER)
    switch = THINKING[kind]
    return {} if switch is None else dict.fromkeys(SWITCHES, switch)


def _shows_thinking(fields: Fields) -> bool:
    inner = fields.inside("thinking")
    display = inner.take("display", STRING)
    if display not in (None, "summarized", "omitted"):
        raise _not_among("thinking.display", ("summarized", "omitted"), inner.raw("display"))
    return display != "omitted"


def _session(fields: Fields) -> str:
    """The session that `metadata.user_id` names, "" if it names none: a user is no session."""
    inner = fields.inside("metadata")
    user = inner.take("user_id", STRING) or ""
    if found := SESSION.search(user):
        session = found[1]
    else:
        try:
            session = msgspec.json.decode(user, type=_User).session_id
        except (msgspec.DecodeError, RecursionError):
            return ""
    return session if len(session) <= MAX_CACHE_KEY_CHARS else ""


class _User(msgspec.Struct):
    """What Claude Code writes into `metadata.user_id`, as JSON."""

    session_id: str


def _without_effect(fields: Fields) -> list[str]:
    """Refuse what this server cannot do; gives the names of what has no effect though it is known."""
    for key, neutral in NOT_HERE.items():
        raw = fields.raw(key)
        if raw is not None and raw not in neutral:
            raise InvalidRequest(f"{key} is not a field of /v1/messages", param=key)
    if fields.read(declared.MCP_SERVERS):
        raise InvalidRequest("mcp_servers must be empty: this server calls no others", param="mcp_servers")
    inner = fields.inside("output_config")
    inner.raw("format")
    return [inner.name(key) for key in inner.untaken()]


def _translated(fields: Fields) -> Fields:
    """What nobody has read yet, in a chat's spelling."""
    stops = fields.read(declared.STOP_SEQUENCES)
    rest = {key: msgspec.Raw(raw) for key in fields.untaken() if (raw := fields.raw(key)) is not None}
    rest["model"] = msgspec.Raw(fields.raw("model") or b"null")
    if stops:
        rest["stop"] = msgspec.Raw(msgspec.json.encode(stops))
    return Fields(rest)


def _format(fields: Fields) -> Grammar | None:
    """The schema that the answer must match; `output_format` is where it was before `output_config`."""
    for outer, key in ((fields.inside("output_config"), "format"), (fields, "output_format")):
        if outer.raw(key) is not None:
            shape = outer.inside(key)
            if shape.take("type", STRING) != "json_schema":
                raise _not_among(shape.name("type"), ("json_schema",), shape.raw("type"))
            return described_schema(shape, outer.name(key))
    return None


@contextmanager
def spelled_back() -> Iterator[None]:
    """Errors name the fields as this route has them."""
    try:
        yield
    except InvalidRequest as error:
        for theirs, ours in _SPELLED_BACK:
            error.message = theirs.sub(ours, error.message)
            error.param = None if error.param is None else theirs.sub(ours, error.param)
        raise


def _not_among(name: str, allowed: tuple[str, ...], raw: bytes | None) -> InvalidRequest:
    got = "nothing" if raw is None else describe(raw, shows=True)
    return InvalidRequest(f"{name} must be one of {', '.join(allowed)}, got {got}", param=name)
