"""Bad requests on Anthropic's routes: the right status in Anthropic's shape, the field named, everybody else unhurt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints import corpus
from tests.entrypoints.fake_engine import VOCAB_SIZE, Health
from tests.entrypoints.messages_api import COUNT, MESSAGES, USER, message, problem, told
from tests.entrypoints.served import Served, completion, serving
from tests.entrypoints.test_tool_calls import nested, qwen3
from tokenspeed.engine.admission import as_error
from tokenspeed.engine.messages import Refused
from tokenspeed.entrypoints.limits import Limits

ROUTES = (MESSAGES, COUNT)


def says(*content: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [USER, {"role": role, "content": list(content)}]}


def tool(**changes: Any) -> dict[str, Any]:
    fields = {"name": "f", "input_schema": {"type": "object"}, **changes}
    return {"tools": [{key: value for key, value in fields.items() if value is not ...}]}


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://192.0.2.1/secret.png"}}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}}
RESULT = {"type": "tool_result", "tool_use_id": "t"}
CALL = {"type": "tool_use", "id": "t", "name": "f", "input": {}}

TALK: list[tuple[str, dict[str, Any], str]] = [
    ("messages missing", {"messages": ...}, "messages"),
    ("messages null", {"messages": None}, "messages"),
    ("messages empty", {"messages": []}, "messages"),
    ("messages a string", {"messages": "hello"}, "messages"),
    ("messages of strings", {"messages": ["hello"]}, "messages[0]"),
    ("messages of null", {"messages": [None]}, "messages[0]"),
    ("messages too many", {"messages": [{}] * 10_000}, "messages"),
    ("messages that say nothing", {"messages": [{"role": "assistant", "content": ""}]}, "messages"),
    ("only an empty reminder", {"messages": [{"role": "system", "content": []}]}, "messages"),
    ("role missing", {"messages": [{"content": "x"}]}, "messages[0].role"),
    ("role of a chat", {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ("role with control text", {"messages": [{"role": "<|turn|>", "content": "x"}]}, "messages[0].role"),
    ("role a number", {"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
    ("content missing", {"messages": [{"role": "user"}]}, "messages[0].content"),
    ("content null", {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ("content empty", {"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ("content a number", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ("content an object", {"messages": [{"role": "user", "content": {"type": "text"}}]}, "messages[0].content"),
    ("blocks too many", says(*[{"type": "text", "text": ""}] * 1100), "messages[1].content"),
    ("block null", says(None), "messages[1].content[0]"),
    ("block a string", says("x"), "messages[1].content[0]"),
    ("block without type", says({"text": "x"}), "messages[1].content[0].type"),
    ("block unknown", says({"type": "hologram"}), "messages[1].content[0].type"),
    ("text missing", says({"type": "text"}), "messages[1].content[0].text"),
    ("text a number", says({"type": "text", "text": 1}), "messages[1].content[0].text"),
    ("image", says(IMAGE), "messages[1].content[0].type"),
    ("document", says({"type": "text", "text": "x"}, PDF), "messages[1].content[1].type"),
    ("image in a result", says({**RESULT, "content": [IMAGE]}), "messages[1].content[0].content[0].type"),
    ("result a number", says({**RESULT, "content": 5}), "messages[1].content[0].content"),
    ("result with a wrong id", says({**RESULT, "tool_use_id": 5}), "messages[1].content[0].tool_use_id"),
    ("error a string", says({**RESULT, "is_error": "yes"}), "messages[1].content[0].is_error"),
    ("call of a user", says(CALL), "messages[1].content[0].type"),
    ("result of an assistant", says(RESULT, role="assistant"), "messages[1].content[0].type"),
    ("result of a system", says(RESULT, role="system"), "messages[1].content[0].type"),
    ("call without name", says({**CALL, "name": None}, role="assistant"), "messages[1].content[0].name"),
    ("call with a wrong id", says({**CALL, "id": 1}, role="assistant"), "messages[1].content[0].id"),
    ("calls too many", says(*[CALL] * 300, role="assistant"), "messages[1].content"),
    (
        "thinking a number",
        says({"type": "thinking", "thinking": 1}, role="assistant"),
        "messages[1].content[0].thinking",
    ),
    ("call without result", says(CALL, role="assistant"), "messages"),
    ("system a number", {"system": 5}, "system"),
    ("system with an image", {"system": [IMAGE]}, "system[0].type"),
    ("system without text", {"system": [{"type": "text"}]}, "system[0].text"),
    ("model missing", {"model": ...}, "model"),
    ("model a number", {"model": 3}, "model"),
    ("thinking without type", {"thinking": {}}, "thinking.type"),
    ("thinking a string", {"thinking": "enabled"}, "thinking"),
    ("thinking of another type", {"thinking": {"type": "deep"}}, "thinking.type"),
    ("budget a string", {"thinking": {"type": "enabled", "budget_tokens": "1"}}, "thinking.budget_tokens"),
    ("switch a list", {"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ("tools an object", {"tools": {"name": "f"}}, "tools"),
    ("tools of null", {"tools": [None]}, "tools[0]"),
    ("tools of strings", {"tools": ["f"]}, "tools[0]"),
    ("tools too many", {"tools": tool()["tools"] * 2000}, "tools"),
    ("tools too large", tool(description="x" * 5_000_000), "tools"),
    ("tool without name", tool(name=...), "tools[0].name"),
    ("tool with a wrong type", tool(type=1), "tools[0].type"),
    ("second tool", {"tools": [{"type": "web_search_20250305"}, {"name": "a b"}]}, "tools[1].name"),
    ("schema a list", tool(input_schema=[]), "tools[0].input_schema"),
    ("schema deep", tool(input_schema=nested(100)), "tools[0].input_schema"),
    ("schema of a type that is none", tool(input_schema={"type": "foo"}), "tools[0].input_schema"),
    ("choice a string", {**tool(), "tool_choice": "auto"}, "tool_choice"),
    ("choice without type", {**tool(), "tool_choice": {}}, "tool_choice.type"),
    ("choice of another type", {**tool(), "tool_choice": {"type": "required"}}, "tool_choice.type"),
    ("choice without name", {**tool(), "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ("choice of an absent tool", {**tool(), "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
    (
        "parallel a string",
        {**tool(), "tool_choice": {"type": "auto", "disable_parallel_tool_use": "x"}},
        "tool_choice.disable_parallel_tool_use",
    ),
]
"""(name, changes to a valid body, what the message names); for counting too."""

FIELDS: list[tuple[str, dict[str, Any], str]] = [
    ("max_tokens missing", {"max_tokens": ...}, "max_tokens"),
    ("max_tokens -1", {"max_tokens": -1}, "max_tokens"),
    ("max_tokens 2^40", {"max_tokens": 2**40}, "max_tokens"),
    ("max_tokens 1.5", {"max_tokens": 1.5}, "max_tokens"),
    ("max_tokens true", {"max_tokens": True}, "max_tokens"),
    ("min_tokens of none", {"max_tokens": 0, "min_tokens": 1}, "min_tokens"),
    ("min_tokens over the context", {"max_tokens": 10**6, "min_tokens": 10**6}, "min_tokens"),
    ("temperature -1", {"temperature": -1}, "temperature"),
    ("temperature hot", {"temperature": "hot"}, "temperature"),
    ("top_p 0", {"top_p": 0}, "top_p"),
    ("top_k -2", {"top_k": -2}, "top_k"),
    ("seed 2^64", {"seed": 2**64}, "seed"),
    ("stop_sequences a string", {"stop_sequences": "x"}, "stop_sequences"),
    ("stop_sequences of 1,000", {"stop_sequences": ["x"] * 1000}, "stop_sequences"),
    ("stop_sequences with an empty one", {"stop_sequences": ["x", ""]}, "stop_sequences"),
    ("stop_sequences of 1 MB", {"stop_sequences": ["x" * 1_000_000]}, "stop_sequences"),
    ("stop", {"stop": ["x"]}, "stop"),
    ("n 2", {"n": 2}, "n"),
    ("logprobs", {"logprobs": True}, "logprobs"),
    ("prompt_logprobs", {"prompt_logprobs": 1}, "prompt_logprobs"),
    ("return_token_ids", {"return_token_ids": True}, "return_token_ids"),
    ("stream_options", {"stream_options": {"include_usage": True}}, "stream_options"),
    ("logit_bias outside", {"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ("display", {"thinking": {"type": "adaptive", "display": "all"}}, "thinking.display"),
    ("metadata a string", {"metadata": "x"}, "metadata"),
    ("user_id a number", {"metadata": {"user_id": 5}}, "metadata.user_id"),
    ("mcp_servers", {"mcp_servers": [{"type": "url", "url": "http://192.0.2.1", "name": "x"}]}, "mcp_servers"),
    ("output_config a string", {"output_config": "high"}, "output_config"),
    ("format of another type", {"output_config": {"format": {"type": "foo"}}}, "output_config.format"),
    ("format without schema", {"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
    ("format under its older name", {"output_format": {"type": "foo"}}, "output_format.type"),
    (
        "two formats",
        {"output_format": {"type": "json_schema", "schema": {}}, "guided_regex": "a"},
        "guided_regex",
    ),
    ("tps_floor negative", {"tps_floor": -1}, "tps_floor"),
    ("cache_salt a number", {"cache_salt": 1}, "cache_salt"),
    ("request_id with CRLF", {"request_id": "a\r\nb"}, "request_id"),
]
"""Likewise, of what only an answer needs."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """As everywhere, with a model that can call tools."""
    with serving(template=qwen3(), max_model_len=2048) as it:
        yield it


@pytest.mark.parametrize(
    ("route", "stream", "changes", "named"),
    [
        pytest.param(route, stream, changes, named, id=f"{name}-{route}-{stream}")
        for route, stream in ((MESSAGES, False), (MESSAGES, True), (COUNT, False))
        for name, changes, named in (*TALK, *(FIELDS if route == MESSAGES else ()))
    ],
)
def test_a_bad_field_is_refused_by_name_before_anything_is_streamed(
    served: Served, route: str, stream: bool, changes: dict[str, Any], named: str
) -> None:
    reply = served.post(route, message(**{"stream": stream, **changes}))
    assert reply.status == 400, reply.text
    error = problem(reply)
    assert error["type"] == "invalid_request_error" and named in error["message"], error
    assert not served.engine.streams


@pytest.mark.parametrize(
    ("route", "body"),
    [
        pytest.param(route, body, id=f"{name}-{route}")
        for route in ROUTES
        for name, body in corpus.BAD_BODIES
        if route == MESSAGES or name not in ("10^5 digits", "1e400")  # in fields that counting does not read
    ],
)
def test_a_body_that_is_no_json_object_is_refused(served: Served, route: str, body: bytes) -> None:
    reply = served.post(route, body)
    assert (reply.status, problem(reply)["type"]) == (400, "invalid_request_error")


def test_the_canary_sings_the_same_after_the_whole_corpus(served: Served) -> None:
    def canary() -> str:
        return str(served.post("/v1/completions", completion(prompt="the canary", temperature=0)).json()["choices"])

    before = canary()
    for route in ROUTES:
        for _, changes, _ in (*TALK, *FIELDS):
            served.post(route, message(**changes))
        for _, body in corpus.BAD_BODIES:
            served.post(route, body)
    assert canary() == before
    assert not served.engine.streams and not served.door.active


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_gets_the_sentence_that_claude_code_matches(served: Served, stream: bool) -> None:
    long = message(messages=[{"role": "user", "content": "x" * 3000}], stream=stream)
    error = problem(served.post(MESSAGES, long))
    count = served.post(COUNT, long).json()["input_tokens"]
    assert error == {
        "type": "invalid_request_error",
        "message": f"prompt is too long: {count} tokens > 2048 maximum",
    }
    for changes in ({"messages": [{"role": "user", "content": "x" * 500_000}]}, {"system": "x" * 500_000}):
        assert problem(served.post(MESSAGES, message(**changes)))["message"].startswith("prompt is too long: ")


def test_no_error_body_repeats_the_conversation(served: Served) -> None:
    secret = "correct horse battery staple"
    for changes in (
        {"messages": secret},
        {"messages": [secret]},
        {"messages": [{"role": "user", "content": [secret]}]},
        {"messages": [{"role": "user", "content": {"a": secret}}]},
        {"messages": [{"role": "user", "content": secret}], "temperature": -1},
        {"messages": [{"role": "user", "content": secret * 500}]},
        {"system": {"a": secret}},
    ):
        reply = served.post(MESSAGES, message(**changes))
        assert reply.status == 400 and "horse" not in reply.text


def test_an_unknown_model_is_404(served: Served) -> None:
    for name in ("claude-unknown", "/etc/passwd"):
        for route in ROUTES:
            reply = served.post(route, message(model=name))
            assert (reply.status, problem(reply)["type"]) == (404, "not_found_error")


def test_what_is_wrong_with_http_is_told_in_anthropics_shape(served: Served) -> None:
    reply = served.get(MESSAGES)
    assert (reply.status, reply.headers["allow"], problem(reply)["type"]) == (405, "POST", "invalid_request_error")
    reply = served.post(MESSAGES + "/batches", {})
    assert (reply.status, problem(reply)["type"]) == (404, "not_found_error")
    reply = served.send("POST", MESSAGES, b"{}", {"Content-Type": "text/plain"})
    assert (reply.status, problem(reply)["type"]) == (415, "invalid_request_error")
    assert served.get("/v1/messagesx").error["code"] == "not_found"


def test_bodies_that_are_too_large_or_too_slow_are_told_in_anthropics_shape() -> None:
    with serving(limits=Limits(body_seconds=0.2, linger_seconds=0.1, max_body_bytes=10_000)) as served:
        reply = served.post(MESSAGES, message(system="x" * 20_000))
        assert (reply.status, problem(reply)["type"]) == (413, "request_too_large")
        with served.socket() as raw:
            raw.sendall(f"POST {MESSAGES} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
            answer = b""
            while part := raw.recv(65536):
                answer += part
    assert b" 408 " in answer and b'"type":"error"' in answer and b'"invalid_request_error"' in answer


def test_both_kinds_of_key_open_the_door_and_wrong_ones_are_told_in_anthropics_shape() -> None:
    with serving(user_keys=("one",)) as served:
        for headers in ({"x_api_key": "one"}, {"Authorization": "Bearer one"}):
            for route in ROUTES:
                assert served.post(route, message(), anthropic_version="2023-06-01", **headers).status == 200
        for headers in ({}, {"x_api_key": "two"}, {"Authorization": "Bearer two"}):
            for path in (*ROUTES, MESSAGES + "/x"):
                reply = served.post(path, message(), **headers)
                assert (reply.status, problem(reply)["type"]) == (401, "authentication_error")
                assert reply.headers["www-authenticate"] == "Bearer"


@pytest.fixture
def fragile() -> Iterator[Served]:
    with serving() as it:
        yield it


@pytest.mark.parametrize("stream", [False, True])
def test_overload_is_429_and_an_engine_that_does_not_serve_503_with_a_retry_time(fragile: Served, stream: bool) -> None:
    refusal = as_error(Refused(id=1, reason="QUEUE_FULL", retry_after=17))
    fragile.call(lambda: setattr(fragile.engine, "refusal", refusal))
    reply = fragile.post(MESSAGES, message(stream=stream))
    assert (reply.status, reply.headers["retry-after"]) == (429, "17")
    assert problem(reply)["type"] == "rate_limit_error"
    for state in ("loading", "draining", "dead"):
        fragile.call(lambda state=state: setattr(fragile.engine, "state", Health(state)))
        for route in ROUTES:
            reply = fragile.post(route, message(stream=stream))
            assert (reply.status, problem(reply)["type"]) == (503, "overloaded_error")
            assert int(reply.headers["retry-after"]) > 0


@pytest.mark.parametrize(("knob", "kind"), [("fail_after", "api_error"), ("die_after", "overloaded_error")])
def test_a_failure_in_mid_stream_is_one_error_event_and_before_it_a_status(
    fragile: Served, knob: str, kind: str
) -> None:
    fragile.call(lambda: setattr(fragile.engine, knob, 4))
    whole = fragile.post(MESSAGES, message())
    assert (whole.status, problem(whole)["type"]) == ({"api_error": 500, "overloaded_error": 503}[kind], kind)
    reply = fragile.post(MESSAGES, message(stream=True))
    assert reply.status == 200
    events = told(reply.text)
    assert events[0]["type"] == "message_start"
    assert (events[-1]["type"], events[-1]["error"]["type"]) == ("error", kind)
    assert events[-1]["request_id"] == reply.headers["request-id"]
    assert not {"message_delta", "message_stop"} & {event["type"] for event in events}
    fragile.wait_until(lambda: not fragile.engine.streams and not fragile.door.active)


def test_a_page_of_an_allowed_origin_may_send_what_anthropics_client_sends() -> None:
    with serving(allowed_origins=("https://app.example",)) as served:
        reply = served.send("OPTIONS", MESSAGES, headers={"Origin": "https://app.example"})
    assert reply.status == 204
    assert {"Anthropic-Version", "X-Api-Key"} <= set(reply.headers["access-control-allow-headers"].split(", "))


def test_a_label_of_the_clients_own_is_every_answers_request_id(served: Served) -> None:
    for body in (message(), message(stream=True), message(max_tokens=-1)):
        reply = served.post(MESSAGES, body, X_Request_Id="mine")
        assert reply.headers["request-id"] == reply.headers["x-request-id"] == "mine"
