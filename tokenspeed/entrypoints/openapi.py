"""The OpenAPI document, and the field tables of docs/api.md, made of what `fields.py` declares.

`python -m tokenspeed.entrypoints.openapi` prints the document; with `--write docs/api.md` it renews the tables there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from tokenspeed import __version__
from tokenspeed.entrypoints import fields as f
from tokenspeed.entrypoints import schema, schema_anthropic, schema_generate, schema_responses
from tokenspeed.entrypoints.auth import ADMIN_ROUTES, OPEN_ROUTES
from tokenspeed.entrypoints.body import Field
from tokenspeed.entrypoints.errors import speaks_anthropic

AnyFields = tuple[Field[Any], ...]

CHAT: AnyFields = (
    *f.CONVERSATION,
    f.MAX_TOKENS,
    f.MAX_COMPLETION_TOKENS,
    f.LOGPROBS,
    f.TOP_LOGPROBS,
    f.INCLUDE_REASONING,
    f.CHAT_ECHO,
)
COMPLETION: AnyFields = (f.PROMPT, f.ECHO, f.COMPLETION_MAX_TOKENS, f.COMPLETION_LOGPROBS)
RESPONSES: AnyFields = (
    f.INPUT,
    f.INSTRUCTIONS,
    f.PREVIOUS_RESPONSE_ID,
    f.STORE,
    f.TOOLS,
    f.TOOL_CHOICE,
    f.PARALLEL_TOOL_CALLS,
    f.MAX_OUTPUT_TOKENS,
    f.TEXT_FORMAT,
    f.INCLUDE,
    f.TOP_LOGPROBS,
    f.INCLUDE_REASONING,
    f.CHAT_TEMPLATE_KWARGS,
    f.TRUNCATION,
    f.RESPONSES_METADATA,
    f.MAX_TOOL_CALLS,
    f.REASONING,
    f.SAFETY_IDENTIFIER,
    f.USER,
)
PROMPT_OF_MESSAGES: AnyFields = (
    f.MESSAGES,
    f.SYSTEM,
    f.TOOLS,
    f.MESSAGES_TOOL_CHOICE,
    f.THINKING,
    f.CHAT_TEMPLATE_KWARGS,
)
MESSAGES: AnyFields = (
    *PROMPT_OF_MESSAGES,
    f.MESSAGES_MAX_TOKENS,
    f.STOP_SEQUENCES,
    f.OUTPUT_CONFIG,
    f.OUTPUT_FORMAT,
    f.MESSAGES_METADATA,
    f.MCP_SERVERS,
)
GENERATE: AnyFields = (
    f.GENERATE_TEXT,
    f.INPUT_IDS,
    f.SAMPLING_PARAMS,
    f.STREAM,
    f.RETURN_LOGPROB,
    f.TOP_LOGPROBS_NUM,
    f.RID,
    f.PRIORITY,
    f.ANY_MODEL,
)
TOKENIZE: AnyFields = (
    f.TEXT,
    *(field for field in f.CONVERSATION if field is not f.MESSAGES),
    f.OPTIONAL_MESSAGES,
    f.ADD_SPECIAL_TOKENS,
    f.RETURN_TOKEN_STRS,
    f.ANY_MODEL,
)
DETOKENIZE: AnyFields = (f.TOKENS, f.ANY_MODEL)


def _less(fields: Iterable[Field[Any]], *others: Field[Any]) -> AnyFields:
    return tuple(field for field in fields if field not in others)


@dataclass(frozen=True, slots=True)
class Route:
    """One route. `own` are the fields that it reads alone, `shared` those that it has in common with others."""

    method: str
    path: str
    about: str
    own: AnyFields = ()
    shared: AnyFields = ()
    streams: bool = False

    @property
    def fields(self) -> AnyFields:
        """All that its body may have."""
        return (*self.own, *self.shared)


EVERYTHING: AnyFields = (*f.SAMPLING, *f.DELIVERY)

ROUTES = (
    Route("POST", "/v1/chat/completions", "OpenAI's chat", CHAT, EVERYTHING, True),
    Route("POST", "/v1/completions", "OpenAI's completions", COMPLETION, EVERYTHING, True),
    Route("POST", "/v1/responses", "OpenAI's responses", RESPONSES, _less(EVERYTHING, f.N, f.PROMPT_LOGPROBS,
          f.RETURN_TOKEN_IDS), True),
    Route("GET", "/v1/responses/{id}", "a stored response, or one that runs"),
    Route("DELETE", "/v1/responses/{id}", "forget a stored response"),
    Route("POST", "/v1/responses/{id}/cancel", "end a response that runs"),
    Route("GET", "/v1/responses/{id}/input_items", "what a stored response was the answer to"),
    Route("POST", "/v1/messages", "Anthropic's messages", MESSAGES, _less(EVERYTHING, f.N, f.PROMPT_LOGPROBS,
          f.STOP, f.STREAM_OPTIONS, f.RETURN_TOKEN_IDS), True),
    Route("POST", "/v1/messages/count_tokens", "the tokens of a conversation", PROMPT_OF_MESSAGES, (f.MODEL,)),
    Route("POST", "/generate", "SGLang's own route: texts or token ids in and out", GENERATE, (), True),
    Route("GET", "/v1/models", "the served names, with `max_model_len`"),
    Route("GET", "/v1/models/{name}", "one of them"),
    Route("POST", "/tokenize", "a text, or messages as the chat template renders them, to ids", TOKENIZE),
    Route("POST", "/detokenize", "ids to text", DETOKENIZE),
    Route("GET", "/health", "liveness: 503 when the engine's heartbeat is not heard, or it is dead or restarted"),
    Route("GET", "/ready", "200 when a request sent now would be served"),
    Route("GET", "/health_generate", "one real token through the whole engine"),
    Route("GET", "/metrics", "Prometheus text"),
    Route("GET", "/version", "the package's version"),
    Route("GET", "/v1/load", "how busy the engine is; also as `/v1/loads`"),
    Route("GET", "/v1/loads", "the same"),
    Route("GET", "/server_info", "sizes and settings; also as `/get_server_info`"),
    Route("GET", "/get_server_info", "the same"),
    Route("GET", "/model_info", "what the model is; also as `/get_model_info`"),
    Route("GET", "/get_model_info", "the same"),
    Route("GET", "/openapi.json", "this list, with all fields, as OpenAPI 3.1"),
    Route("POST", "/abort_request", "end running requests; needs the admin key", (f.ABORTED,)),
    Route("POST", "/flush_cache", "free the cached KV blocks that no request holds; needs the admin key"),
    Route("POST", "/reset_prefix_cache", "the same"),
)  # fmt: skip


# The document ------------------------------------------------------------------------------------------


def document() -> dict[str, Any]:
    """The whole API as OpenAPI 3.1."""
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "TokenSpeed", "version": __version__},
        "paths": paths,
        "security": [{"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _ERROR},
        },
    }


_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _operation(route: Route) -> dict[str, Any]:
    content: dict[str, Any] = {"text/plain" if route.path == "/metrics" else "application/json": {}}
    error = {} if speaks_anthropic(route.path) else {"schema": {"$ref": "#/components/schemas/Error"}}
    if route.streams:
        content["text/event-stream"] = {}
    operation: dict[str, Any] = {
        "summary": route.about,
        "responses": {
            "200": {"description": "done", "content": content},
            "default": {
                "description": "refused or failed",
                "content": {"application/json": error},
            },
        },
    }
    names = re.findall(r"\{(\w+)\}", route.path)
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if route.fields:
        body = {"application/json": {"schema": _object(route.fields)}}
        operation["requestBody"] = {"required": True, "content": body}
    if route.path in OPEN_ROUTES:
        operation["security"] = []
    if route.path in ADMIN_ROUTES:
        operation["description"] = "Needs a key of --admin-api-key."
    return operation


def _object(fields: Iterable[Field[Any]]) -> dict[str, Any]:
    listed = list(fields)
    schema: dict[str, Any] = {"type": "object", "properties": {field.name: _property(field) for field in listed}}
    required = [field.name for field in listed if field.required]
    return {**schema, "required": required} if required else schema


def _property(field: Field[Any]) -> dict[str, Any]:
    schema = _object(field.inner) if field.inner else msgspec.json.schema(field.kind.type)
    ranges = {"minimum": field.least, "exclusiveMinimum": field.above, "maximum": field.most}
    schema |= {key: value for key, value in ranges.items() if value is not None}
    schema["description"] = field.about
    if field.default is not None:
        schema["default"] = field.default
    return schema


# The tables --------------------------------------------------------------------------------------------

BEGIN, END = "<!-- fields: made by tokenspeed.entrypoints.openapi -->", "<!-- fields: end -->"


def tables() -> str:
    """The fields of all routes in Markdown: what several have in common, then what each has alone."""
    parts = [
        _table("How tokens are chosen", f.SAMPLING),
        _table("How the answer goes out", f.DELIVERY),
    ]
    for route in ROUTES:
        if route.own:
            without = [field.name for field in EVERYTHING if field not in route.shared] if route.streams else []
            also = "" if route.shared != EVERYTHING else "And all of the above."
            if route.streams and route.shared and without:
                also = f"And all of the above but {', '.join(f'`{name}`' for name in without)}."
            parts.append(_table(f"{route.method} {route.path}", route.own, also))
    return "\n".join([*parts, _names("Accepted without effect", HINTS), _names("Refused with a 400", REFUSED)])


HINTS = {"all routes": schema.HINTS, "/v1/messages": schema_anthropic.HINTS}
REFUSED = {
    "all routes, unless they ask for nothing": schema.UNSUPPORTED,
    "/v1/responses": {**schema_responses.UNSUPPORTED, **schema_responses.NOT_HERE},
    "/v1/messages": schema_anthropic.NOT_HERE,
    "/generate": schema_generate.NOT_HERE,
}


def _names(title: str, of: Mapping[str, Iterable[str]]) -> str:
    lines = [f"- {where}: {', '.join(f'`{name}`' for name in sorted(names))}" for where, names in of.items()]
    return "\n".join([f"### {title}", "", *lines, ""])


def _table(title: str, fields: Sequence[Field[Any]], also: str = "") -> str:
    lines = [f"### {title}", "", "| field | is | default | |", "|---|---|---|---|"]
    lines += [_row(field) for field in fields]
    return "\n".join([*lines, "", *([also, ""] if also else [])])


def _row(field: Field[Any]) -> str:
    # That a number must fit 32 or 64 bits is not worth a reader's while.
    least = None if field.least is not None and field.least <= -(2**31) else field.least
    most = None if field.most is not None and field.most >= f.MAX_INT else field.most
    shown = replace(field, least=least, most=most).range
    kind = field.kind.allowed + (" of " if shown.startswith("at ") else " ") + shown if shown else field.kind.allowed
    default = "required" if field.required else "" if field.default is None else f"`{_shown(field.default)}`"
    about = field.about
    if field.inner and field is not f.SAMPLING_PARAMS:
        about += ": " + ", ".join(f"`{inner.name}`" for inner in field.inner)
    if field is f.SAMPLING_PARAMS:
        renamed = ", ".join(f"`{theirs}` for `{ours.name}`" for theirs, ours in f.RENAMED.items())
        about += f": those of the first table but `prompt_logprobs`, with `max_new_tokens` (128) and {renamed}"
    return f"| `{field.name}` | {kind} | {default} | {about} |"


def _shown(value: object) -> str:
    return msgspec.json.encode(value).decode()


def with_tables(page: str) -> str:
    """A page of documentation with its tables renewed."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no place for tables: {BEGIN} … {END}")
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


def main(arguments: Sequence[str]) -> None:
    """Print the document, or renew the tables of the page after `--write`."""
    if not arguments:
        print(msgspec.json.format(msgspec.json.encode(document()), indent=1).decode())
    elif len(arguments) == 2 and arguments[0] == "--write":
        page = Path(arguments[1])
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.exit("usage: python -m tokenspeed.entrypoints.openapi [--write docs/api.md]")


if __name__ == "__main__":
    main(sys.argv[1:])
