"""What a gateway's `GenerateRequest` is to the engine, field by field; a field is honoured or refused by its name."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import ParseDict
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed.entrypoints.grpc.asked import MAX_ID_BYTES, Asked, Terms
from tokenspeed.errors import InvalidRequest
from tokenspeed.request import Grammar, SamplingParams

NOTHING: Mapping[str, float] = {}
LEAST: dict[str, Any] = {"request_id": "r", "tokenized": {"input_ids": [1, 2]}}

HONOURED: dict[str, tuple[Any, dict[str, Any]]] = {
    "temperature": (0.0, {"temperature": 0.0}),
    "top_p": (0.5, {"top_p": 0.5}),
    "top_k": (-1, {"top_k": -1}),
    "min_p": (0.25, {"min_p": 0.25}),
    "frequency_penalty": (-0.5, {"frequency_penalty": -0.5}),
    "presence_penalty": (0.0, {"presence_penalty": 0.0}),
    "repetition_penalty": (1.5, {"repetition_penalty": 1.5}),
    "max_new_tokens": (7, {"max_tokens": 7}),
    "min_new_tokens": (3, {"min_tokens": 3}),
    "stop": (["a", "bc"], {"stop": ("a", "bc")}),
    "stop_token_ids": ([4, 5], {"stop_token_ids": (4, 5)}),
    "ignore_eos": (True, {"ignore_eos": True}),
    "skip_special_tokens": (True, {"skip_special_tokens": True}),
    "n": (3, {"n": 3}),
    "logit_bias": ({"7": -2.0, "0": 1.5}, {"logit_bias": {7: -2.0, 0: 1.5}}),
    "regex": ("a+", {"grammar": Grammar("regex", "a+", field="regex")}),
    "json_schema": ("{}", {"grammar": Grammar("json_schema", "{}", field="json_schema")}),
    "ebnf_grammar": ("root ::= x", {"grammar": Grammar("ebnf", "root ::= x", field="ebnf_grammar")}),
    "structural_tag": ("{}", {"grammar": Grammar("structural_tag", "{}", field="structural_tag")}),
    "sampling_seed": (11, {"seed": 11}),
}
"""Fields of the sampling parameters that become one of ours: a value, and ours."""

TERMS: dict[str, Any] = {"cache_salt": "s", "priority": -2, "prompt_cache_key": "k", "tps_floor": 70.5}
OF_WHO_MAKES_THE_TEXT = {"spaces_between_special_tokens"}

REFUSED: dict[str, Any] = {
    "mm_inputs": {},
    "encode_bootstrap_info": {},
    "kv_bootstrap_info": {"bootstrap_room": 1},
    "data_parallel_rank": 0,
    "logprob_start_len": 0,
    "token_ids_logprob": [1],
}
TAKEN = {"request_id", "tokenized", "sampling_params", "return_logprob", "top_logprobs_num", "stream"}
"""Fields of the request that the tests below are about."""


def asked(fields: Mapping[str, Any] = NOTHING, defaults: Mapping[str, float] = NOTHING, **sampling: Any) -> Asked:
    request = ParseDict({**LEAST, **fields}, pb.GenerateRequest())
    if sampling:
        ParseDict(sampling, request.sampling_params)
    return Asked.of(request, defaults)


def refusal(fields: Mapping[str, Any] = NOTHING, **sampling: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        asked(fields, **sampling)
    return refused.value


def names(message: Any) -> set[str]:
    fields: list[FieldDescriptor] = list(message.DESCRIPTOR.fields)
    return {field.name for field in fields}


def test_every_field_of_the_protocol_is_honoured_or_refused_by_some_test_here() -> None:
    assert names(pb.SamplingParams) == {*HONOURED, *OF_WHO_MAKES_THE_TEXT, "no_stop_trim", "custom_params"}
    assert names(pb.GenerateRequest) == {*REFUSED, *TAKEN}
    assert names(pb.TokenizedInput) == {"input_ids", "original_text"}


@pytest.mark.parametrize("field", HONOURED)
def test_a_sampling_parameter_is_what_the_engine_is_asked(field: str) -> None:
    value, ours = HONOURED[field]
    assert asked(**{field: value}).params == SamplingParams(**{"skip_special_tokens": False, **ours})


def test_nothing_asked_is_nothing_but_the_ids() -> None:
    found = asked()
    assert (found.request_id, found.ids, found.stream, found.keeps_stop) == ("r", array("i", [1, 2]), False, False)
    assert found.ids.typecode == "i"
    assert found.params == SamplingParams(skip_special_tokens=False)
    assert found.terms == Terms()
    found = asked({"stream": True}, no_stop_trim=True)
    assert (found.stream, found.keeps_stop) == (True, True)


def test_what_is_absent_is_the_checkpoints_own_and_a_zero_that_was_sent_is_not() -> None:
    own = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    found = asked({}, own, temperature=0.0).params
    assert (found.temperature, found.top_p, found.top_k) == (0.0, 0.95, 20)
    assert asked({}, own, top_k=-1).params.top_k == -1


@pytest.mark.parametrize(
    ("sent", "ours"), [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)]
)
def test_a_seed_of_64_bits_is_one_of_our_signed_ones(sent: int, ours: int) -> None:
    params = asked(sampling_seed=sent).params
    assert params.seed == ours
    params.check(vocab_size=10)


def test_a_message_has_no_seed_unless_one_was_sent() -> None:
    assert asked(n=2).params.seed is None


def test_log_probabilities_come_when_asked_for_with_as_many_alternatives() -> None:
    assert asked({"top_logprobs_num": 4}).params.logprobs is None
    assert asked({"return_logprob": True}).params.logprobs == 0
    assert asked({"return_logprob": True, "top_logprobs_num": 4}).params.logprobs == 4
    assert asked({"return_logprob": True, "logprob_start_len": -1}).params.logprobs == 0
    assert refusal({"return_logprob": True, "top_logprobs_num": -1}).param == "top_logprobs_num"


@pytest.mark.parametrize("field", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_its_name(field: str) -> None:
    error = refusal({field: REFUSED[field]})
    assert error.param == field and field in error.message


@pytest.mark.parametrize("ids", [[], [1, 2**31], [2**32 - 1]])
def test_a_prompt_is_ids_of_31_bits_and_at_least_one(ids: list[int]) -> None:
    error = refusal({"tokenized": {"input_ids": ids, "original_text": "never tokenized here"}})
    assert error.param == "tokenized.input_ids"
    assert not ids or str(max(ids)) in error.message


def test_the_largest_ids_pass_on_to_where_the_vocabulary_is_known() -> None:
    assert list(asked({"tokenized": {"input_ids": [0, 2**31 - 1]}}).ids) == [0, 2**31 - 1]


@pytest.mark.parametrize("id", ["", "x" * (MAX_ID_BYTES + 1), "ü" * (MAX_ID_BYTES // 2 + 1), "a\nb", "a\x1b[2Jb"])
def test_an_id_is_short_and_fit_for_a_log_line(id: str) -> None:
    assert refusal({"request_id": id}).param == "request_id"


def test_an_id_may_be_of_any_letters() -> None:
    for id in ("chatcmpl-0b1c_2.3/4", "ü" * (MAX_ID_BYTES // 2)):
        assert asked({"request_id": id}).request_id == id


@pytest.mark.parametrize("key", ["", "x", "-1", "1.0", " 1", "1_0", "+1", "٣", "01", "1" * 5000])
def test_a_bias_is_keyed_by_a_token_id(key: str) -> None:
    error = refusal(logit_bias={"5": 1.0, key: 1.0})
    assert error.param == "logit_bias" and len(error.message) < 200
    assert repr(key[:64]) in error.message


def test_terms_are_custom_parameters() -> None:
    assert asked(custom_params=TERMS).terms == Terms(**TERMS)
    assert asked(custom_params={"tps_floor": 0}).terms.tps_floor == 0.0
    assert isinstance(asked(custom_params={"priority": 3}).terms.priority, int)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speed", 1),
        ("x" * 100, 1),
        ("cache_salt", 1),
        ("cache_salt", None),
        ("prompt_cache_key", ["k"]),
        ("priority", "1"),
        ("priority", 1.5),
        ("priority", True),
        ("tps_floor", "70"),
        ("tps_floor", {}),
    ],
)
def test_custom_parameters_that_nobody_knows_or_of_a_wrong_kind_are_refused(name: str, value: Any) -> None:
    error = refusal(custom_params={name: value})
    assert error.param == f"custom_params.{name[:64]}" and error.param in error.message
    assert len(error.message) < 200


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_endless_priority_is_refused(value: float) -> None:
    request = ParseDict(LEAST, pb.GenerateRequest())
    request.sampling_params.custom_params.fields["priority"].number_value = value
    with pytest.raises(InvalidRequest) as refused:
        Asked.of(request, NOTHING)
    assert refused.value.param == "custom_params.priority"
