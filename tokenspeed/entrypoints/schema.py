"""What chat and completions have in common: sampling, delivery, and the fields that have no place here.

Precedence of a sampling value: the request, then the checkpoint's generation defaults, then OpenAI's default.
A field is either supported, a hint that is accepted without effect (`HINTS`), known but not supported (400), or
unknown (ignored and named in one log line).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from tokenspeed.entrypoints import fields as declared
from tokenspeed.entrypoints.body import (
    BOOLEAN,
    Field,
    Fields,
    describe,
)
from tokenspeed.entrypoints.limits import (
    MAX_BAD_WORD_BYTES,
    MAX_BAD_WORDS,
    MAX_BYTES_A_TOKEN,
    MAX_CACHE_KEY_CHARS,
    MAX_ID_LIST,
    MAX_LABEL_CHARS,
    MAX_SALT_CHARS,
)
from tokenspeed.entrypoints.schema_grammar import asked_grammar
from tokenspeed.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound
from tokenspeed.request import SamplingParams

HINTS = frozenset(
    {
        "cache_control",
        "client_metadata",
        "include",
        "max_tool_calls",
        "metadata",
        "nvext",
        "prompt_cache_options",
        "prompt_cache_retention",
        "reasoning",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "session_id",
        "thinking",
        "user",
        "verbosity",
    }
)
"""Fields that clients and routers always send and that have no effect here: accepted, logged once a process."""

UNSUPPORTED: Mapping[str, tuple[bytes, ...]] = {
    "audio": (),
    "best_of": (b"1",),
    "chat_template": (),
    "documents": (b"[]",),
    "function_call": (b'"none"',),
    "functions": (b"[]",),
    "length_penalty": (b"1", b"1.0"),
    "logits_processors": (b"[]",),
    "lora_path": (),
    "modalities": (b'["text"]',),
    "prediction": (),
    "store": (b"false",),
    "stop_regex": (),
    "structural_tag": (),
    "suffix": (b'""',),
    "top_a": (b"0",),
    "truncate_prompt_tokens": (),
    "typical_p": (b"1", b"1.0"),
    "use_beam_search": (b"false",),
    "web_search_options": (),
}
"""Known fields that this version cannot honour, with the values that mean "without it"; null always does."""

ONLY_CHAT: Mapping[str, tuple[bytes, ...]] = {"tool_choice": (b'"none"', b'"auto"'), "tools": (b"[]",)}
"""Likewise, for fields that only a chat can honour."""


@dataclass(frozen=True, slots=True)
class Model:
    """What a request is checked against. `names` are the served names, the first one is told to clients.

    `no_tools` is why requests with tools are refused, empty if they are not.
    """

    names: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    defaults: Mapping[str, float]
    no_tools: str = ""


@dataclass(frozen=True, slots=True)
class Delivery:
    """How the answer goes out, and what is said about the request in the log.

    `label` is the client's own id, never used as an identity. `hints` and `unknown` name ignored fields, `repaired`
    those that were malformed and could be put right.
    """

    model: str
    stream: bool
    include_usage: bool
    return_token_ids: bool
    label: str | None
    cache_salt: str
    priority: int
    prompt_cache_key: str
    tps_floor: float | None
    hints: tuple[str, ...]
    unknown: tuple[str, ...]
    repaired: tuple[str, ...] = ()


def model_name(fields: Fields, model: Model, *, required: bool = True) -> str:
    """The checked `model` field: 400 when missing or not a string, 404 when this server does not serve it."""
    name = fields.read(declared.MODEL)
    if name is None:
        if required:
            raise InvalidRequest(f"model is required; this server serves {', '.join(model.names)}", param="model")
        return model.names[0]
    if name not in model.names:
        served = ", ".join(model.names)
        raise ModelNotFound(
            f"The model {_quoted(name)} does not exist; this server serves {served}",
            param="model",
            code="model_not_found",
        )
    return name


def delivery(fields: Fields, model: Model) -> Delivery:
    """Read the fields that say how to answer. Call last: whatever was not taken until then is unknown."""
    name = model_name(fields, model)
    stream = fields.value(declared.STREAM)
    include_usage = False
    unknown: list[str] = []
    options = fields.read(declared.STREAM_OPTIONS)
    if options is not None:
        if not stream:
            raise InvalidRequest("stream_options is allowed only with stream: true", param="stream_options")
        inner = Fields(options, "stream_options.")
        include_usage = inner.value(declared.INCLUDE_USAGE)
        if inner.take_or("continuous_usage_stats", BOOLEAN, False):
            raise _unsupported("stream_options.continuous_usage_stats")
        unknown += [inner.name(key) for key in inner.untaken() if key != "include_obfuscation"]
    label = checked_label(fields.read(declared.REQUEST_ID), "request_id")
    salt = fields.value(declared.CACHE_SALT)
    if len(salt) > MAX_SALT_CHARS:
        raise InvalidRequest(f"cache_salt must have at most {MAX_SALT_CHARS} characters", param="cache_salt")
    priority = fields.value(declared.PRIORITY)
    cache_key = fields.value(declared.PROMPT_CACHE_KEY)
    if len(cache_key) > MAX_CACHE_KEY_CHARS:
        raise InvalidRequest(
            f"prompt_cache_key must have at most {MAX_CACHE_KEY_CHARS} characters", param="prompt_cache_key"
        )
    tps_floor = fields.read(declared.TPS_FLOOR)
    return_token_ids = fields.value(declared.RETURN_TOKEN_IDS)
    refuse_unsupported(fields)
    rest = fields.untaken()
    return Delivery(
        model=name,
        stream=stream,
        include_usage=include_usage,
        return_token_ids=return_token_ids,
        label=label,
        cache_salt=salt,
        priority=priority,
        prompt_cache_key=cache_key,
        tps_floor=tps_floor,
        hints=tuple(key for key in rest if key in HINTS),
        unknown=(*(key for key in rest if key not in HINTS), *unknown),
    )


def refuse_unsupported(fields: Fields) -> None:
    """400 for the first known field that asks for something this version does not do."""
    for key, neutral in UNSUPPORTED.items():
        raw = fields.raw(key)
        if raw is not None and bytes(raw) not in neutral:
            raise _unsupported(key)


def refuse_only_chat(fields: Fields) -> None:
    """400 for the first field that only a chat can honour."""
    for key, neutral in ONLY_CHAT.items():
        raw = fields.raw(key)
        if raw is not None and raw not in neutral:
            raise InvalidRequest(f"{key} is for /v1/chat/completions", param=key)


def checked_label(label: str | None, name: str) -> str | None:
    """A client's request id, safe to echo in a header and a log line: printable ASCII without spaces."""
    if label is None:
        return None
    if not 1 <= len(label) <= MAX_LABEL_CHARS or not all("!" <= character <= "~" for character in label):
        raise InvalidRequest(
            f"{name} must be 1 to {MAX_LABEL_CHARS} printable ASCII characters without spaces", param=name
        )
    return label


def sampling_params(
    fields: Fields, model: Model, *, max_tokens: int | None, logprobs: int | None, min_max_tokens: int = 1
) -> SamplingParams:
    """Everything that decides which tokens come, checked against the vocabulary.

    `max_tokens` and `logprobs` are spelled differently by the routes, which read them. `min_max_tokens` 0
    allows max_tokens 0; the engine is then asked for one token that is not shown.
    """

    def number(field: Field[float]) -> float:
        value = fields.read(field)
        return float(model.defaults.get(field.name, field.default or 0.0)) if value is None else value

    top_k = fields.read(declared.TOP_K)
    prompt_logprobs = fields.read(declared.PROMPT_LOGPROBS)
    if max_tokens is not None and not min_max_tokens <= max_tokens < 2**31:
        raise InvalidRequest(
            f"max_tokens must be between {min_max_tokens} and {2**31 - 1}, got {max_tokens}", param="max_tokens"
        )
    allowed = fields.read(declared.ALLOWED_TOKEN_IDS)
    params = SamplingParams(
        temperature=number(declared.TEMPERATURE),
        top_k=int(model.defaults.get("top_k", 0)) if top_k is None else top_k,
        top_p=number(declared.TOP_P),
        min_p=number(declared.MIN_P),
        repetition_penalty=number(declared.REPETITION_PENALTY),
        presence_penalty=number(declared.PRESENCE_PENALTY),
        frequency_penalty=number(declared.FREQUENCY_PENALTY),
        logit_bias=_logit_bias(fields),
        bad_words=_bad_words(fields),
        allowed_token_ids=None if allowed is None else _bounded_ids("allowed_token_ids", allowed, model.vocab_size),
        min_tokens=fields.value(declared.MIN_TOKENS),
        max_tokens=max_tokens if max_tokens is None else max(1, max_tokens),
        stop=_stop(fields),
        stop_token_ids=_bounded_ids("stop_token_ids", fields.read(declared.STOP_TOKEN_IDS) or [], MAX_ID_LIST),
        ignore_eos=fields.value(declared.IGNORE_EOS),
        seed=fields.read(declared.SEED),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        n=fields.value(declared.N),
        skip_special_tokens=fields.value(declared.SKIP_SPECIAL_TOKENS),
        include_stop_str_in_output=fields.value(declared.INCLUDE_STOP),
        grammar=asked_grammar(fields),
    )
    params.check(model.vocab_size)
    if params.allowed_token_ids is not None and all(
        params.logit_bias.get(token_id, 0.0) <= -100.0 for token_id in params.allowed_token_ids
    ):
        raise InvalidRequest("logit_bias of −100 bans every allowed token", param="logit_bias")
    return params


def check_text_fits(size: int, model: Model, param: str) -> None:
    """Refuse text that cannot fit the context whatever its tokens are, before it is tokenized."""
    if size > model.max_model_len * MAX_BYTES_A_TOKEN:
        raise ContextLengthExceeded(
            limit=model.max_model_len, prompt=-(-size // MAX_BYTES_A_TOKEN), completion=1, param=param
        )


def _stop(fields: Fields) -> tuple[str, ...]:
    stop = fields.read(declared.STOP)
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _bad_words(fields: Fields) -> tuple[str, ...]:
    words = fields.read(declared.BAD_WORDS) or []
    if len(words) > MAX_BAD_WORDS:
        raise InvalidRequest(
            f"bad_words must have at most {MAX_BAD_WORDS} entries, got {len(words)}", param="bad_words"
        )
    for word in words:
        if not word.strip() or len(word.encode()) > MAX_BAD_WORD_BYTES:
            raise InvalidRequest(f"a bad word must have 1 to {MAX_BAD_WORD_BYTES} bytes", param="bad_words")
    return tuple(words)


def _logit_bias(fields: Fields) -> dict[int, float]:
    biases = fields.read(declared.LOGIT_BIAS) or {}
    result: dict[int, float] = {}
    for key, bias in biases.items():
        if not key.isascii() or not key.isdigit() or len(key) > 10:
            raise InvalidRequest("logit_bias has a key that is not a token id", param="logit_bias")
        result[int(key)] = bias
    return result


def _bounded_ids(name: str, ids: list[int], limit: int) -> tuple[int, ...]:
    if len(ids) > limit:
        raise InvalidRequest(f"{name} must have at most {limit} entries, got {len(ids)}", param=name)
    return tuple(ids)


def _unsupported(key: str) -> InvalidRequest:
    return InvalidRequest(f"{key} is not supported by this version", param=key)


def _quoted(name: str) -> str:
    shown = describe(msgspec.json.encode(name), shows=True)
    return shown if shown != "a string" else "named in the request"
