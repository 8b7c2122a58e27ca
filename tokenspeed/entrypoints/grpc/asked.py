"""What a `GenerateRequest` asks of the engine; what cannot be honoured is refused, by the name of its field."""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed.errors import InvalidRequest
from tokenspeed.request import Grammar, GrammarKind, SamplingParams

SCALARS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Optional scalars and our names for them; absent ones are the checkpoint's own defaults, then ours."""

GRAMMARS: dict[str, GrammarKind] = {
    "regex": "regex",
    "json_schema": "json_schema",
    "ebnf_grammar": "ebnf",
    "structural_tag": "structural_tag",
}
ELSEWHERE = ("mm_inputs", "encode_bootstrap_info", "kv_bootstrap_info")
"""Messages of other deployments: media, and prompts computed by another worker."""

MAX_ID_BYTES = 256
TOKEN_ID = re.compile(r"0|[1-9]\d{0,9}", re.ASCII)
"""As a key: one spelling each, of 32 bits or a little more."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the engine is told besides tokens and sampling; as fields of `custom_params`."""

    cache_salt: str = ""
    priority: int = 0
    prompt_cache_key: str = ""
    tps_floor: float | None = None


@dataclass(frozen=True, slots=True)
class Asked:
    """One call. `keeps_stop` leaves the stop token that ended a choice among its ids."""

    request_id: str
    ids: array[int]
    params: SamplingParams
    terms: Terms
    stream: bool
    keeps_stop: bool

    @classmethod
    def of(cls, request: pb.GenerateRequest, defaults: Mapping[str, float]) -> Asked:
        """Raise `InvalidRequest` naming the field that cannot be honoured."""
        name = request.request_id
        if not name or len(name.encode()) > MAX_ID_BYTES or not name.isprintable():
            raise InvalidRequest(f"request_id must have 1 to {MAX_ID_BYTES} bytes, printable ones", param="request_id")
        for field in ELSEWHERE:
            if request.HasField(field):
                raise InvalidRequest(f"{field} is not supported: this engine computes whole texts itself", param=field)
        if request.HasField("data_parallel_rank"):
            raise InvalidRequest(
                "data_parallel_rank is not supported: the engine chooses the group of ranks", param="data_parallel_rank"
            )
        if not request.tokenized.input_ids:
            raise InvalidRequest("tokenized.input_ids is empty: send token ids", param="tokenized.input_ids")
        try:
            ids = array("i", request.tokenized.input_ids)
        except OverflowError:
            wrong = max(request.tokenized.input_ids)
            raise InvalidRequest(
                f"tokenized.input_ids has {wrong}, which is in no vocabulary", param="tokenized.input_ids"
            ) from None
        asked = request.sampling_params
        return cls(
            name,
            ids,
            _params(request, defaults),
            _terms(asked),
            request.stream,
            asked.no_stop_trim,
        )


def _params(request: pb.GenerateRequest, defaults: Mapping[str, float]) -> SamplingParams:
    asked = request.sampling_params
    named: dict[str, Any] = dict(defaults)
    named |= {ours: getattr(asked, name) for name, ours in SCALARS.items() if asked.HasField(name)}
    if asked.HasField("sampling_seed"):
        named["seed"] = (asked.sampling_seed + 2**63) % 2**64 - 2**63  # ours are signed
    return SamplingParams(
        **named,
        min_tokens=asked.min_new_tokens,
        stop=tuple(asked.stop),
        stop_token_ids=tuple(asked.stop_token_ids),
        ignore_eos=asked.ignore_eos,
        skip_special_tokens=asked.skip_special_tokens,
        n=asked.n or 1,
        logit_bias=_biases(asked.logit_bias),
        logprobs=_logprobs(request),
        grammar=_grammar(asked),
    )


def _biases(asked: Mapping[str, float]) -> dict[int, float]:
    wrong = next((name for name in asked if not TOKEN_ID.fullmatch(name)), None)
    if wrong is not None:
        raise InvalidRequest(f"logit_bias must be keyed by token ids, got {wrong[:64]!r}", param="logit_bias")
    return {int(name): bias for name, bias in asked.items()}


def _logprobs(request: pb.GenerateRequest) -> int | None:
    """How many alternatives to each token; None: no log-probabilities."""
    if request.HasField("logprob_start_len") and request.logprob_start_len >= 0:
        raise InvalidRequest(
            "logprob_start_len is not supported: an answer of this protocol has no place for a prompt's",
            param="logprob_start_len",
        )
    if request.token_ids_logprob:
        raise InvalidRequest("token_ids_logprob is not supported", param="token_ids_logprob")
    if request.top_logprobs_num < 0:
        raise InvalidRequest(
            f"top_logprobs_num must not be negative, got {request.top_logprobs_num}", param="top_logprobs_num"
        )
    return request.top_logprobs_num if request.return_logprob else None


def _grammar(asked: pb.SamplingParams) -> Grammar | None:
    name = asked.WhichOneof("constraint")
    return None if name is None else Grammar(GRAMMARS[name], getattr(asked, name), field=name)


def _terms(asked: pb.SamplingParams) -> Terms:
    kinds: dict[str, tuple[str, type]] = {
        "cache_salt": ("string_value", str),
        "priority": ("number_value", int),
        "prompt_cache_key": ("string_value", str),
        "tps_floor": ("number_value", float),
    }
    found: dict[str, Any] = {}
    for name, value in asked.custom_params.fields.items():
        field = f"custom_params.{name[:64]}"
        if name not in kinds:
            raise InvalidRequest(f"{field} is unknown ({', '.join(kinds)} are known)", param=field)
        kind, make = kinds[name]
        if value.WhichOneof("kind") != kind or (make is int and not value.number_value.is_integer()):
            what = {str: "text", int: "an integer", float: "a number"}[make]
            raise InvalidRequest(f"{field} must be {what}", param=field)
        found[name] = make(getattr(value, kind))
    return Terms(**found)
