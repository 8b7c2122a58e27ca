"""The body of POST /v1/completions, checked whole before anything is tokenized."""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import structs

from tokenspeed.entrypoints import fields as declared
from tokenspeed.entrypoints.body import Fields, decode
from tokenspeed.entrypoints.limits import MAX_CHOICES, MAX_PROMPTS
from tokenspeed.entrypoints.schema import (
    Delivery,
    Model,
    check_text_fits,
    delivery,
    model_name,
    refuse_only_chat,
    refuse_unsupported,
    sampling_params,
)
from tokenspeed.errors import ContextLengthExceeded, InvalidRequest
from tokenspeed.request import SamplingParams

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One or more prompts, all sampled alike. Choices are numbered prompt by prompt.

    `echo` puts the prompt before the completion; `shows_completion` is False for max_tokens 0, where one
    token is generated and thrown away so that the prompt's log-probabilities come by the usual way.
    """

    prompts: list[Prompt]
    params: SamplingParams
    echo: bool
    shows_completion: bool
    shows_prompt_logprobs: bool
    delivery: Delivery


def completion_request(body: bytes, model: Model) -> CompletionRequest:
    """Parse and check, or raise a `RequestError` that names the first field at fault."""
    fields = Fields.parse(body)
    model_name(fields, model)
    refuse_unsupported(fields)
    refuse_only_chat(fields)
    prompts = read_prompts(fields, model, "prompt")
    echo = fields.value(declared.ECHO)
    logprobs = fields.read(declared.COMPLETION_LOGPROBS)
    max_tokens = fields.value(declared.COMPLETION_MAX_TOKENS)
    params = sampling_params(fields, model, max_tokens=max_tokens, logprobs=logprobs, min_max_tokens=0 if echo else 1)
    if max_tokens == 0 and params.min_tokens > 0:
        raise InvalidRequest("min_tokens must be 0 with max_tokens 0", param="min_tokens")
    if len(prompts) * params.n > MAX_CHOICES:
        raise InvalidRequest(f"prompts × n must be at most {MAX_CHOICES}, got {len(prompts)} × {params.n}", param="n")
    shows_prompt_logprobs = params.prompt_logprobs is not None
    if echo and logprobs is not None:
        wanted = max(logprobs, params.prompt_logprobs or 0)
        params = structs.replace(params, prompt_logprobs=wanted)
    how = delivery(fields, model)
    if how.stream and shows_prompt_logprobs:
        raise InvalidRequest("prompt_logprobs is not available with stream: true", param="prompt_logprobs")
    return CompletionRequest(
        prompts=prompts,
        params=params,
        echo=echo,
        shows_completion=max_tokens > 0,
        shows_prompt_logprobs=shows_prompt_logprobs,
        delivery=how,
    )


def read_prompts(fields: Fields, model: Model, name: str) -> list[Prompt]:
    """One or more prompts from the field of that name, each a text or token ids that can fit the context."""
    raw = fields.raw(name)
    if raw is None:
        raise InvalidRequest(f"{name} is required", param=name)
    if raw.count(b",") > MAX_PROMPTS * model.max_model_len and raw.startswith(b"["):
        raise InvalidRequest(f"{name} has too many elements", param=name)
    value = decode(raw, declared.PROMPT.kind, name)
    if isinstance(value, str):
        return [_text(value, model, name)]
    if not value:
        raise InvalidRequest(f"{name} must not be empty", param=name)
    ids = [item for item in value if isinstance(item, int)]
    if len(ids) == len(value):
        return [_ids(ids, model, name)]
    if len(value) > MAX_PROMPTS:
        raise InvalidRequest(f"{name} must have at most {MAX_PROMPTS} prompts, got {len(value)}", param=name)
    texts = [item for item in value if isinstance(item, str)]
    if len(texts) == len(value):
        return [_text(text, model, name) for text in texts]
    lists = [item for item in value if isinstance(item, list)]
    if len(lists) == len(value):
        return [_ids(item, model, name) for item in lists]
    raise InvalidRequest(f"{name} must not mix strings and token ids", param=name)


def _text(text: str, model: Model, name: str) -> str:
    if not text:
        raise InvalidRequest(f"{name} must not be empty", param=name)
    check_text_fits(len(text.encode()), model, name)
    return text


def _ids(ids: list[int], model: Model, name: str) -> list[int]:
    if not ids:
        raise InvalidRequest(f"{name} must not be empty", param=name)
    if len(ids) > model.max_model_len:
        raise ContextLengthExceeded(limit=model.max_model_len, prompt=len(ids), completion=1, param=name)
    for token_id in (min(ids), max(ids)):
        if not 0 <= token_id < model.vocab_size:
            raise InvalidRequest(
                f"{name} has token id {token_id}; the vocabulary has ids 0 to {model.vocab_size - 1}", param=name
            )
    return ids
