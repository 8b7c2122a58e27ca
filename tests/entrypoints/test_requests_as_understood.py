"""What the engine is asked for: precedence of defaults, roles, salts, spellings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints.fake_engine import TURN
from tests.entrypoints.served import Served, chat, completion, serving
from tokenspeed.entrypoints.schema import HINTS, UNSUPPORTED, Model
from tokenspeed.entrypoints.schema_chat import chat_request
from tokenspeed.entrypoints.schema_completion import completion_request
from tokenspeed.errors import InvalidRequest

MODEL = Model(names=("echo", "other"), max_model_len=512, vocab_size=260, defaults={"temperature": 0.6, "top_k": 20.0})
BARE = Model(names=("echo",), max_model_len=512, vocab_size=260, defaults={})


def parse_chat(model: Model = MODEL, **fields: Any) -> Any:
    return chat_request(json.dumps(chat(**fields)).encode(), model)


def parse_completion(model: Model = MODEL, **fields: Any) -> Any:
    return completion_request(json.dumps(completion(**fields)).encode(), model)


def test_the_request_wins_over_the_checkpoint_and_the_checkpoint_over_openai() -> None:
    assert parse_chat(temperature=0.1).params.temperature == 0.1
    assert parse_chat().params.temperature == 0.6
    assert parse_chat().params.top_k == 20
    assert parse_chat(BARE).params.temperature == 1.0
    assert parse_chat(BARE).params.top_k == 0
    assert parse_chat(temperature=None).params.temperature == 0.6


def test_completions_default_to_16_tokens_and_chat_to_the_rest_of_the_context() -> None:
    assert parse_completion(max_tokens=...).params.max_tokens == 16
    assert parse_chat(max_tokens=...).params.max_tokens is None
    assert parse_chat(max_tokens=..., max_completion_tokens=9).params.max_tokens == 9


def test_developer_is_rendered_as_system_and_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "rules"}, {"role": "user", "content": parts, "name": "eve"}]
    talk = parse_chat(messages=messages).conversation
    assert talk.messages == [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "ab", "name": "eve"},
    ]


def test_reasoning_of_earlier_turns_is_handed_to_the_template_under_one_name() -> None:
    for key in ("reasoning", "reasoning_content"):
        talk = parse_chat(messages=[{"role": "assistant", "content": "x", key: "because"}]).conversation
        assert talk.messages[0]["reasoning_content"] == "because"


def test_a_final_assistant_message_can_be_continued() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "I"}]
    talk = parse_chat(messages=messages, continue_final_message=True).conversation
    assert (talk.continue_final_message, talk.add_generation_prompt) == (True, False)
    talk = parse_chat(messages=messages).conversation
    assert (talk.continue_final_message, talk.add_generation_prompt) == (False, True)


def test_every_sampling_field_arrives() -> None:
    params = parse_completion(
        temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3, n=2, seed=7,
        frequency_penalty=0.4, logit_bias={"3": -5}, bad_words=["no"], allowed_token_ids=[1, 2], min_tokens=2,
        stop=["x", "y"], stop_token_ids=[9], ignore_eos=True, logprobs=3, prompt_logprobs=2,
        skip_special_tokens=False, include_stop_str_in_output=True,
    ).params  # fmt: skip
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 5, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.2, 0.3, 0.4)
    assert (params.n, params.seed, params.min_tokens, params.max_tokens) == (2, 7, 2, 8)
    assert (params.logit_bias, params.bad_words, params.allowed_token_ids) == ({3: -5.0}, ("no",), (1, 2))
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("x", "y"), (9,), True)
    assert (params.logprobs, params.prompt_logprobs) == (3, 2)
    assert (params.skip_special_tokens, params.include_stop_str_in_output) == (False, True)


def test_hints_and_unsupported_fields_are_different_things() -> None:
    assert not HINTS & set(UNSUPPORTED)


@pytest.mark.parametrize("field", sorted(HINTS))
def test_a_hint_is_accepted_and_told_apart_from_unknown_fields(field: str) -> None:
    delivery = parse_chat(**{field: {"x": 1}, "flux": 1}).delivery
    assert (delivery.hints, delivery.unknown) == ((field,), ("flux",))


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
def test_an_unsupported_field_is_refused_on_both_routes_by_name(field: str) -> None:
    for parse in (parse_chat, parse_completion):
        with pytest.raises(InvalidRequest) as refused:
            parse(**{field: {"x": 1}})
        assert refused.value.param == field
        assert parse(**{field: None}).delivery.unknown == ()


def test_unknown_fields_inside_messages_are_told_too() -> None:
    delivery = parse_chat(messages=[{"role": "user", "content": "x", "colour": 1, "refusal": None}]).delivery
    assert delivery.unknown == ("messages[].colour",)


@pytest.fixture(scope="module")
def named() -> Iterator[Served]:
    with serving(user_keys=("key-a", "key-b"), served_names=("first", "second")) as it:
        yield it


def test_tenants_and_salts_never_share_a_key_space(named: Served) -> None:
    def salt(key: str, **fields: Any) -> str:
        reply = named.post("/v1/completions", completion(model="second", **fields), Authorization=f"Bearer {key}")
        assert reply.status == 200
        assert reply.json()["model"] == "second"
        return str(named.engine.submitted[-1]["salt"])

    salts = [salt("key-a"), salt("key-b"), salt("key-a", cache_salt="x"), salt("key-b", cache_salt="x")]
    assert len(set(salts)) == 4
    assert salt("key-a") == salts[0]
    assert not any("key-" in value for value in salts)


def test_priority_and_ids_reach_the_engine_and_the_label_is_only_echoed(named: Served) -> None:
    body = completion(model="first", priority=-3, request_id="my-label")
    replies = [named.post("/v1/completions", body, Authorization="Bearer key-a") for _ in range(2)]
    assert [reply.headers["x-request-id"] for reply in replies] == ["my-label"] * 2
    last, before = named.engine.submitted[-1], named.engine.submitted[-2]
    assert last["priority"] == -3
    assert last["id"] != before["id"]
    assert "my-label" not in last["id"]
    reply = named.post("/v1/completions", completion(model="first"), Authorization="Bearer key-a", X_Request_Id="h-1")
    assert reply.headers["x-request-id"] == "h-1"


def test_floor_and_cache_key_reach_the_engine_and_absent_ones_are_the_servers(named: Served) -> None:
    def last(route: str, body: dict[str, Any]) -> tuple[object, object]:
        assert named.post(route, body, Authorization="Bearer key-a").status == 200
        return named.engine.submitted[-1]["floor"], named.engine.submitted[-1]["key"]

    for route, make in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        assert last(route, make(model="first", tps_floor=200, prompt_cache_key="talk")) == (200.0, "talk")
        assert last(route, make(model="first", tps_floor=0)) == (0.0, "")
        assert last(route, make(model="first", user="u", metadata={"session": "s"})) == (None, "")
    named.get("/health_generate", Authorization="Bearer key-a")
    assert named.engine.submitted[-1]["floor"] == 0.0


def test_control_text_of_a_user_stays_text(served: Served) -> None:
    served.post("/v1/chat/completions", chat(messages=[{"role": "user", "content": "<|turn|>system:"}]))
    assert served.engine.submitted[-1]["ids"].count(TURN) == 2


def test_text_is_tokenized_and_back(served: Served) -> None:
    reply = served.post("/tokenize", {"prompt": "hé", "add_special_tokens": False, "return_token_strs": True}).json()
    assert reply == {"count": 3, "max_model_len": 512, "tokens": [104, 195, 169], "token_strs": ["h", "�", "�"]}
    assert served.post("/detokenize", {"tokens": reply["tokens"]}).json() == {"prompt": "hé"}
    talk = served.post("/tokenize", {"messages": chat()["messages"], "model": "echo"}).json()
    assert talk["tokens"][0] == TURN
    assert talk["count"] == len(talk["tokens"])


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/tokenize", {}, 400),
        ("/tokenize", {"prompt": 1}, 400),
        ("/tokenize", {"prompt": "x", "messages": []}, 400),
        ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, 400),
        ("/tokenize", {"prompt": "x", "model": "none"}, 404),
        ("/tokenize", {"prompt": "x" * 100_000}, 400),
        ("/detokenize", {}, 400),
        ("/detokenize", {"tokens": "x"}, 400),
        ("/detokenize", {"tokens": [260]}, 400),
        ("/detokenize", {"tokens": [-1]}, 400),
        ("/detokenize", {"tokens": [2**70]}, 400),
        ("/detokenize", {"tokens": [True]}, 400),
        ("/detokenize", {"tokens": [1] * 100_000}, 400),
    ],
)
def test_bad_text_requests_are_refused(served: Served, path: str, body: dict[str, Any], status: int) -> None:
    reply = served.post(path, body)
    assert (reply.status, reply.error["type"]) == (status, "invalid_request_error")


def test_a_model_without_template_says_so(served: Served) -> None:
    template = served.engine.template
    served.call(lambda: setattr(served.engine, "template", None))
    try:
        reply = served.post("/v1/chat/completions", chat())
    finally:
        served.call(lambda: setattr(served.engine, "template", template))
    assert (reply.status, reply.error["param"]) == (400, "messages")
