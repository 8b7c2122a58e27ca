"""The body of POST /v1/responses, checked whole before anything is rendered: a chat in other words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec
from msgspec import structs

from tokenspeed.entrypoints import fields as declared
from tokenspeed.entrypoints.body import STRING, Fields
from tokenspeed.entrypoints.schema import Model, check_text_fits, delivery, model_name, sampling_params
from tokenspeed.entrypoints.schema_chat import ChatRequest, Conversation, template_kwargs
from tokenspeed.entrypoints.schema_grammar import FORMATS, JSON_OBJECT, described_schema
from tokenspeed.entrypoints.schema_items import Item, ItemReader
from tokenspeed.entrypoints.schema_tools import ToolUse, tool_use
from tokenspeed.errors import InvalidRequest
from tokenspeed.request import Grammar, SamplingParams

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = frozenset(
    {
        LOGPROBS,
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "reasoning.encrypted_content",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
"""Values of `include`. Only log-probabilities are there to be included; the others ask for what this server has not."""

UNSUPPORTED: Mapping[str, tuple[bytes, ...]] = {
    "background": (b"false",),
    "background_options": (),
    "context_management": (b"[]",),
    "conversation": (),
    "moderation": (),
    "prompt": (),
}
"""Fields of this route that this version cannot honour, with the values that mean "without it"; null always does."""

NOT_HERE: Mapping[str, tuple[bytes, ...]] = {
    "echo": (b"false",),
    "logprobs": (b"false",),
    "max_completion_tokens": (),
    "max_tokens": (),
    "messages": (),
    "n": (b"1",),
    "prompt_logprobs": (),
    "return_token_ids": (b"false",),
}
"""Fields of the other routes for which this one has another name or no place, with the values that ask for nothing."""

OWN = frozenset(
    {
        *UNSUPPORTED,
        *NOT_HERE,
        "include",
        "include_reasoning",
        "input",
        "instructions",
        "max_output_tokens",
        "previous_response_id",
        "store",
        "text",
        "top_logprobs",
        "truncation",
    }
)
"""Fields that are read here and that mean nothing, or something else, to what all routes share."""

MAX_METADATA = 16
MAX_METADATA_KEY = 64
MAX_METADATA_VALUE = 512


class Stored(Protocol):
    """What is kept of this client's responses. Asked from a worker thread too."""

    def conversation(self, id: str) -> tuple[Item, ...] | None:
        """All items of the conversation that ended with this response, None if it is not kept."""
        ...

    def item(self, id: str) -> Item | None:
        """The item of this id, None if it is not kept."""
        ...


@dataclass(frozen=True, slots=True)
class ResponsesRequest:
    """A chat, and what the response says about its request: `told`.

    `items` are those of the whole conversation, each with an id, if the response is to be stored. `continues` names the
    response before it.
    """

    chat: ChatRequest
    stores: bool
    continues: str | None
    items: tuple[Item, ...]
    told: dict[str, Any]


def responses_request(body: bytes, model: Model, stored: Stored) -> ResponsesRequest:
    """Parse and check, or raise a `RequestError` that names the first field at fault."""
    fields = Fields.parse(body)
    model_name(fields, model)
    _refuse_unsupported(fields)
    stores = fields.value(declared.STORE)
    instructions = fields.read(declared.INSTRUCTIONS)
    previous = fields.read(declared.PREVIOUS_RESPONSE_ID)
    reader = ItemReader(find=stored.item, keeps=stores, model=model)
    if instructions:
        reader.instruct(instructions)
    _read_input(fields, model, reader, previous, stored)
    shared = fields.without(OWN)
    use = tool_use(shared, model, flat=True)
    talk = Conversation(
        messages=reader.done(),
        tool_use=use,
        template_kwargs=template_kwargs(shared),
        add_generation_prompt=True,
        continue_final_message=False,
        unknown=(*reader.unknown, *use.ignored),
        repaired=tuple(reader.repaired),
    )
    text, grammar, ignored = _text_format(fields)
    include_reasoning = fields.value(declared.INCLUDE_REASONING)
    logprobs, hints = _logprobs(fields)
    limit = fields.read(declared.MAX_OUTPUT_TOKENS)
    params = sampling_params(shared, model, max_tokens=limit, logprobs=logprobs)
    params = _with_grammar(params, grammar)
    told = _told(fields, params, use, limit, {"instructions": instructions, "previous_response_id": previous})
    told |= {"store": stores, "text": text, "top_logprobs": logprobs or 0}
    how = delivery(shared, model)
    how = replace(how, hints=how.hints + hints, unknown=(*how.unknown, *ignored, *talk.unknown), repaired=talk.repaired)
    chat = ChatRequest(talk, params, how, include_reasoning)
    return ResponsesRequest(chat, stores, previous, tuple(reader.context), told)


def _refuse_unsupported(fields: Fields) -> None:
    for key, neutral in UNSUPPORTED.items():
        raw = fields.raw(key)
        if raw is not None and raw not in neutral:
            raise InvalidRequest(f"{key} is not supported by this version", param=key)
    for key, neutral in NOT_HERE.items():
        raw = fields.raw(key)
        if raw is not None and raw not in neutral:
            raise InvalidRequest(f"{key} is not a field of /v1/responses", param=key)
    truncation = fields.read(declared.TRUNCATION)
    if truncation not in (None, "disabled"):
        raise InvalidRequest(
            'truncation must be "disabled": this server leaves nothing out of a conversation', param="truncation"
        )


def _read_input(fields: Fields, model: Model, reader: ItemReader, previous: str | None, stored: Stored) -> None:
    """The items of the conversation so far, then those of this request."""
    raw = fields.raw("input")
    if raw is None:
        raise InvalidRequest("input is required: a string or an array of items", param="input")
    earlier = () if previous is None else stored.conversation(previous)
    if earlier is None:
        raise InvalidRequest(
            "previous_response_id names no response that is stored here: send the conversation, or store: true",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    check_text_fits(len(fields.raw("instructions") or b""), model, "instructions")
    check_text_fits(len(raw) + sum(len(item) for item in earlier), model, "input")
    reader.recall(earlier, "previous_response_id")
    reader.take(raw)


def _text_format(fields: Fields) -> tuple[dict[str, Any], Grammar | None, list[str]]:
    """The checked `text` as the response tells it; the grammar of its format, None for any text; what is unknown."""
    text = fields.inside("text")
    shape = text.inside("format")
    kind = shape.take_or("type", STRING, "text")
    told: Any = {"type": kind}
    grammar = None
    if kind == "json_schema":
        told, grammar = msgspec.Raw(text.raw("format") or b""), described_schema(shape, "text.format")
    elif kind == "json_object":
        grammar = Grammar("json_schema", JSON_OBJECT, "text.format")
    elif kind != "text":
        raise InvalidRequest(f"text.format.type must be {FORMATS}", param="text.format.type")
    verbosity = text.take("verbosity", STRING)
    ignored = [text.name(key) for key in text.untaken()]
    return {"format": told, **({"verbosity": verbosity} if verbosity is not None else {})}, grammar, ignored


def _logprobs(fields: Fields) -> tuple[int | None, tuple[str, ...]]:
    """How many alternatives are told beside each token, None for no log-probabilities; and the hints in `include`."""
    wanted = fields.read(declared.INCLUDE) or []
    for index, name in enumerate(wanted):
        if name not in INCLUDABLE:
            raise InvalidRequest(
                f"include[{index}] must be one of {', '.join(sorted(INCLUDABLE))}", param=f"include[{index}]"
            )
    top = fields.read(declared.TOP_LOGPROBS)
    if top and LOGPROBS not in wanted:
        raise InvalidRequest(f'top_logprobs needs include: ["{LOGPROBS}"]', param="top_logprobs")
    hints = ("include",) if set(wanted) - {LOGPROBS} else ()
    return (top or 0) if LOGPROBS in wanted else None, hints


def _with_grammar(params: SamplingParams, grammar: Grammar | None) -> SamplingParams:
    """With that of `text.format`; the fields in which chat has grammars may stand here too, but not beside it."""
    if grammar is None:
        return params
    if params.grammar is not None:
        raise InvalidRequest(f"{params.grammar.field} cannot be combined with text.format", param=params.grammar.field)
    return structs.replace(params, grammar=grammar)


def _told(
    fields: Fields, params: SamplingParams, use: ToolUse, limit: int | None, given: dict[str, Any]
) -> dict[str, Any]:
    """What the response repeats of its request: as it was understood, hints as they came."""
    metadata = fields.read(declared.RESPONSES_METADATA) or {}
    if len(metadata) > MAX_METADATA or any(
        len(key) > MAX_METADATA_KEY or len(value) > MAX_METADATA_VALUE for key, value in metadata.items()
    ):
        raise InvalidRequest(
            f"metadata must have at most {MAX_METADATA} entries, keys of at most {MAX_METADATA_KEY} and values of at "
            f"most {MAX_METADATA_VALUE} characters",
            param="metadata",
        )
    reasoning = fields.inside("reasoning")
    choice = fields.raw("tool_choice")
    return {
        **given,
        "background": False,
        "max_output_tokens": limit,
        "max_tool_calls": fields.read(declared.MAX_TOOL_CALLS),
        "metadata": metadata,
        "parallel_tool_calls": use.parallel,
        "prompt_cache_key": fields.read(declared.PROMPT_CACHE_KEY),
        "reasoning": {key: reasoning.take(key, STRING) for key in ("effort", "summary")},
        "safety_identifier": fields.read(declared.SAFETY_IDENTIFIER),
        "service_tier": "default",
        "temperature": params.temperature,
        "tool_choice": "auto" if choice is None else msgspec.Raw(choice),
        "tools": [_told_tool(tool["function"], use) for tool in use.tools or ()],
        "top_p": params.top_p,
        "truncation": "disabled",
        "user": fields.read(declared.USER),
    }


def _told_tool(function: Mapping[str, Any], use: ToolUse) -> dict[str, Any]:
    return {"type": "function", "description": None, "strict": function["name"] in use.strict, **function}
