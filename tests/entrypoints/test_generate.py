"""POST /generate as SGLang's own benchmark and clients call it."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from tests.entrypoints.fake_engine import logprob
from tests.entrypoints.served import Served, events
from tokenspeed.entrypoints.answers_generate import GenerateAnswer
from tokenspeed.entrypoints.schema import Model
from tokenspeed.entrypoints.schema_generate import generate_request
from tokenspeed.request import RequestOutput


def ask(served: Served, **fields: Any) -> Any:
    reply = served.post("/generate", fields)
    assert reply.status == 200, reply.text
    return reply


PARAMS = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}


def test_the_benchmarks_request_is_answered_with_the_whole_text_so_far(served: Served) -> None:
    reply = ask(
        served, text="hello", sampling_params=PARAMS, stream=True, lora_path=None, image_data=None,
        return_logprob=False, logprob_start_len=-1, stream_options={"include_usage": True},
    )  # fmt: skip
    got = events(reply.text)
    assert got[-1] == "[DONE]"
    assert [item["text"] for item in got[:-1]] == ["h", "he", "hel", "hell"]
    assert [item["meta_info"]["completion_tokens"] for item in got[:-1]] == [1, 2, 3, 4]
    assert [item["meta_info"]["finish_reason"] for item in got[:-1]] == [None] * 3 + [{"type": "length", "length": 4}]
    last = got[-2]["meta_info"]
    assert (last["prompt_tokens"], last["cached_tokens"]) == (5, 0)
    assert last["e2e_latency"] > 0 and "e2e_latency" not in got[0]["meta_info"]
    assert all("index" not in item for item in got[:-1])


@pytest.mark.parametrize("field", [{"text": "hello"}, {"input_ids": list(b"hello")}])
def test_one_prompt_is_answered_by_one_object(served: Served, field: dict[str, Any]) -> None:
    got = ask(served, **field, sampling_params=PARAMS, rid="mine").json()
    assert (got["text"], got["output_ids"], got["meta_info"]["id"]) == ("hell", list(b"hell"), "mine")
    assert got["meta_info"]["finish_reason"] == {"type": "length", "length": 4}


@pytest.mark.parametrize(
    "fields",
    [
        {"text": ["ab", "cd"]},
        {"input_ids": [list(b"ab"), list(b"cd")]},
    ],
)
def test_a_batch_is_answered_by_an_array(served: Served, fields: dict[str, Any]) -> None:
    got = ask(served, **fields, sampling_params=PARAMS).json()
    assert [item["text"] for item in got] == ["abab", "cdcd"]
    assert len({item["meta_info"]["id"] for item in got}) == 2
    streamed = events(ask(served, **fields, sampling_params=PARAMS, stream=True).text)[:-1]
    assert {item["index"]: item["text"] for item in streamed} == {0: "abab", 1: "cdcd"}
    assert len(ask(served, text="ab", sampling_params={**PARAMS, "n": 3}).json()) == 3
    assert len(ask(served, text=["ab"], sampling_params=PARAMS).json()) == 1


def test_sampling_parameters_have_the_other_engines_names(served: Served) -> None:
    ask(
        served,
        text="hello",
        sampling_params={
            "max_new_tokens": 7, "min_new_tokens": 2, "sampling_seed": 5, "no_stop_trim": True, "stop": ["zz"],
            "top_k": -1, "top_p": 0.5,
        },
    )  # fmt: skip
    params = served.engine.submitted[-1]["params"]
    assert (params.max_tokens, params.min_tokens, params.seed, params.include_stop_str_in_output) == (7, 2, 5, True)
    assert (params.stop, params.top_k, params.top_p) == (("zz",), -1, 0.5)
    ask(served, text="hello")
    assert served.engine.submitted[-1]["params"].max_tokens == 128


def test_a_stop_string_and_logprobs_are_told(served: Served) -> None:
    got = ask(
        served, text="hello", sampling_params={"max_new_tokens": 9, "stop": "l"}, return_logprob=True,
        top_logprobs_num=2,
    ).json()  # fmt: skip
    assert got["meta_info"]["finish_reason"] == {"type": "stop", "matched": "l"}
    assert got["meta_info"]["output_token_logprobs"][0] == [-0.5, ord("h"), "h"]
    assert [len(top) for top in got["meta_info"]["output_top_logprobs"]] == [2] * 3


def test_an_event_repeats_what_came_before_as_it_was_written(served: Served) -> None:
    asked = dict(text='"é\\\n', sampling_params={"max_new_tokens": 6}, return_logprob=True, top_logprobs_num=2)
    *got, done = events(ask(served, **asked, stream=True).text)
    assert done == "[DONE]" and [item["text"] for item in got][1:3] == ['"', '"é']
    for before, after in itertools.pairwise(got):
        assert after["output_ids"][:-1] == before["output_ids"]
        for name in ("output_token_logprobs", "output_top_logprobs"):
            assert after["meta_info"][name][:-1] == before["meta_info"][name]
    whole = ask(served, **asked).json()
    assert (got[-1]["text"], got[-1]["output_ids"]) == (whole["text"], whole["output_ids"])
    assert whole["output_ids"] == [*'"é\\\n'.encode(), ord('"')]
    for name in ("output_token_logprobs", "output_top_logprobs"):
        assert got[-1]["meta_info"][name] == whole["meta_info"][name]


def test_an_event_is_not_made_anew_of_all_tokens_before_it() -> None:
    class Counted:
        asked = 0

        def token_bytes(self, token_id: int) -> bytes:
            self.asked += 1
            return b"x"

    texts = Counted()
    body = {"text": "x", "return_logprob": True, "top_logprobs_num": 4, "stream": True}
    request = generate_request(msgspec.json.encode(body), Model(("echo",), 512, 260, {}))
    writer = GenerateAnswer(id="x", request=request, prompt_tokens=[1], texts=texts, elapsed=float)
    for _ in range(50):
        writer.event(0, RequestOutput(request_id="x", text="x", token_ids=[5], logprobs=[logprob(5, 4)]))
    assert texts.asked == 50 * 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": ""}, "text"),
        ({"text": [1, 2]}, "text"),
        ({"text": 5}, "text"),
        ({"input_ids": "abc"}, "input_ids"),
        ({"input_ids": []}, "input_ids"),
        ({"input_ids": [260]}, "input_ids"),
        ({"input_ids": [[1], "a"]}, "input_ids"),
        ({"text": "a" * 600}, "text"),
        ({"input_ids": [1] * 512}, "input_ids"),
        ({"text": "a", "sampling_params": []}, "sampling_params"),
        ({"text": "a", "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens"),
        ({"text": "a", "sampling_params": {"temperature": True}}, "temperature"),
        ({"text": "a", "sampling_params": {"min_new_tokens": -1}}, "min_new_tokens"),
        ({"text": "a", "sampling_params": {"lora_path": "x"}}, "lora_path"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": 0}, "logprob_start_len"),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 10**6}, "top_logprobs_num"),
        ({"text": "a", "rid": "two words"}, "rid"),
        ({"text": "a", "top_logprobs_num": 2}, "top_logprobs_num"),
        ({"text": "a", "sampling_params": {"prompt_logprobs": 2}}, "prompt_logprobs"),
        ({"text": "a", "sampling_params": {"min_new_tokens": 1, "min_tokens": 2}}, "min_new_tokens"),
        ({"text": ["a"] * 200, "sampling_params": {"n": 2}}, "text"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_a_400_that_names_the_field(
    served: Served, fields: dict[str, Any], param: str, stream: bool
) -> None:
    reply = served.post("/generate", {**fields, "stream": stream})
    assert (reply.status, reply.error["param"]) == (400, param), reply.text
