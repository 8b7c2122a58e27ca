"""The body of POST /generate, SGLang's own route: a text or token ids, and `sampling_params` in its words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from tokenspeed.entrypoints import fields as declared
from tokenspeed.entrypoints.body import Fields
from tokenspeed.entrypoints.limits import MAX_CHOICES
from tokenspeed.entrypoints.schema import (
    Delivery,
    Model,
    checked_label,
    model_name,
    refuse_unsupported,
    sampling_params,
)
from tokenspeed.entrypoints.schema_completion import Prompt, read_prompts
from tokenspeed.errors import InvalidRequest
from tokenspeed.request import SamplingParams

NOT_HERE: Mapping[str, tuple[bytes, ...]] = {
    "audio_data": (b"[]",),
    "image_data": (b"[]",),
    "input_embeds": (),
    "logprob_start_len": (b"-1",),
    "lora_path": (),
    "return_hidden_states": (b"false",),
    "session_params": (),
    "token_ids_logprob": (b"[]",),
    "video_data": (b"[]",),
}
"""Fields of SGLang that this version cannot honour, with the values that mean "without it"."""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """`batched` says that the answer is an array, because prompts were, or n is more than 1."""

    prompts: list[Prompt]
    batched: bool
    params: SamplingParams
    delivery: Delivery


def generate_request(body: bytes, model: Model) -> GenerateRequest:
    """Parse and check, or raise a `RequestError` that names the first field at fault."""
    fields = Fields.parse(body)
    model_name(fields, model, required=False)
    _refuse_foreign(fields)
    prompts, batched = _prompts(fields, model)
    inner, names = _sampling_fields(fields)
    if inner.raw(declared.PROMPT_LOGPROBS.name) is not None:
        raise InvalidRequest("prompt_logprobs is not available on /generate", param="prompt_logprobs")
    max_tokens = inner.value(declared.MAX_NEW_TOKENS)
    with _spelled_back(names):
        params = sampling_params(inner, model, max_tokens=max_tokens, logprobs=_logprobs(fields))
        refuse_unsupported(inner)
    if len(prompts) * params.n > MAX_CHOICES:
        raise InvalidRequest(f"prompts × n must be at most {MAX_CHOICES}, got {len(prompts)} × {params.n}", param="n")
    delivery = Delivery(
        model=model.names[0],
        stream=fields.value(declared.STREAM),
        include_usage=False,
        return_token_ids=False,
        label=checked_label(fields.read(declared.RID), "rid"),
        cache_salt="",
        priority=fields.value(declared.PRIORITY),
        prompt_cache_key="",
        tps_floor=None,
        hints=(),
        unknown=(*fields.untaken(), *(f"sampling_params.{names.get(key, key)}" for key in inner.untaken())),
    )
    return GenerateRequest(prompts, batched or params.n > 1, params, delivery)


def _refuse_foreign(fields: Fields) -> None:
    for key, neutral in NOT_HERE.items():
        raw = fields.raw(key)
        if raw is not None and raw not in neutral:
            raise InvalidRequest(f"{key} is not supported by this version", param=key)


def _prompts(fields: Fields, model: Model) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they came as a batch."""
    text, ids = fields.raw("text"), fields.raw("input_ids")
    if (text is None) == (ids is None):
        raise InvalidRequest("exactly one of text and input_ids is required", param="text")
    name = "text" if ids is None else "input_ids"
    prompts = read_prompts(fields, model, name)
    if any(isinstance(prompt, str) != (ids is None) for prompt in prompts):
        kind = "a string or an array of strings" if ids is None else "an array of token ids, or of such arrays"
        raise InvalidRequest(f"{name} must be {kind}", param=name)
    batched = text is not None and text.startswith(b"[")
    return prompts, batched or (ids is not None and ids[1:].lstrip().startswith(b"["))


def _sampling_fields(fields: Fields) -> tuple[Fields, dict[str, str]]:
    """The sampling parameters under our names, and SGLang's name of each that was renamed."""
    given = fields.read(declared.SAMPLING_PARAMS) or {}
    for theirs, field in declared.RENAMED.items():
        if theirs in given and field.name in given:
            raise InvalidRequest(f"{theirs} and {field.name} are the same: only one may be there", param=theirs)
    ours = {theirs: field.name for theirs, field in declared.RENAMED.items()}
    return Fields({ours.get(name, name): raw for name, raw in given.items()}), {ours[name]: name for name in ours}


@contextmanager
def _spelled_back(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the fields as SGLang has them."""
    try:
        yield
    except InvalidRequest as error:
        theirs = names.get(error.param or "")
        if theirs is not None:
            error.message = error.message.replace(str(error.param), theirs)
            error.param = theirs
        raise


def _logprobs(fields: Fields) -> int | None:
    wanted, top = fields.value(declared.RETURN_LOGPROB), fields.value(declared.TOP_LOGPROBS_NUM)
    if top and not wanted:
        raise InvalidRequest("top_logprobs_num needs return_logprob: true", param="top_logprobs_num")
    return top if wanted else None
