"""Whatever is sent: the right status in OpenAI's error shape, the field named, and everybody else unhurt."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.entrypoints import corpus
from tests.entrypoints.corpus import CHAT, COMPLETION, Case
from tests.entrypoints.served import Served, chat, completion, events


def body_for(route: str, changes: dict[str, Any]) -> dict[str, Any]:
    return chat(**changes) if route == CHAT else completion(**changes)


def canary(served: Served) -> str:
    """A greedy request whose answer never changes."""
    reply = served.post(COMPLETION, completion(prompt="the canary", temperature=0))
    assert reply.status == 200
    return str(reply.json()["choices"][0]["text"])


CANARY = "the cana"


def spread(cases: list[Case], streams: tuple[bool, ...] = (False,)) -> list[Any]:
    """Every case on each of its routes, whole and streamed; one that needs a stream is not tried without."""
    return [
        pytest.param(case, route, stream, id=f"{case.name}-{route}-{'streamed' if stream else 'whole'}")
        for case in cases
        for route in case.routes
        for stream in streams
        if stream or "stream_options" not in case.changes
    ]


@pytest.mark.parametrize(("case", "route", "stream"), spread(corpus.BAD_FIELDS, (False, True)))
def test_a_bad_field_is_refused_by_name_before_anything_is_streamed(
    served: Served, case: Case, route: str, stream: bool
) -> None:
    changes = {"stream": True, **case.changes} if stream else dict(case.changes)
    reply = served.post(route, body_for(route, changes))
    assert reply.status == case.status, reply.text
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.error["param"] == case.param
    assert reply.error["type"] == "invalid_request_error"
    assert not served.engine.streams


@pytest.mark.parametrize("case", corpus.NOT_STREAMED, ids=lambda case: case.name)
@pytest.mark.parametrize("route", corpus.BOTH)
def test_a_bad_stream_field_is_refused(served: Served, case: Case, route: str) -> None:
    reply = served.post(route, body_for(route, case.changes))
    assert (reply.status, reply.error["param"]) == (400, case.param)


@pytest.mark.parametrize(("case", "route", "stream"), spread(corpus.FINE, (False, True)))
def test_what_is_fine_is_served(served: Served, case: Case, route: str, stream: bool) -> None:
    reply = served.post(route, body_for(route, {**case.changes, "stream": stream}))
    assert reply.status == 200, reply.text
    assert ("[DONE]" in reply.text) is stream


ONLY_IN_FIELDS = {"10^5 digits", "1e400", "lone surrogate", "low surrogate"}
"""Bad only in a field that the route reads; /tokenize and /detokenize do not read these."""


@pytest.mark.parametrize(
    ("route", "body"),
    [
        pytest.param(route, body, id=f"{name}-{route}")
        for route in (CHAT, COMPLETION, "/tokenize", "/detokenize")
        for name, body in corpus.BAD_BODIES
        if route in corpus.BOTH or name not in ONLY_IN_FIELDS
    ],
)
def test_a_body_that_is_no_json_object_is_refused(served: Served, route: str, body: bytes) -> None:
    reply = served.post(route, body)
    assert reply.status == 400, reply.text
    assert reply.error["type"] == "invalid_request_error"


def test_the_canary_sings_the_same_after_the_whole_corpus(served: Served) -> None:
    assert canary(served) == CANARY
    for case in corpus.BAD_FIELDS:
        for route in case.routes:
            served.post(route, body_for(route, case.changes))
    for _, body in corpus.BAD_BODIES:
        served.post(CHAT, body)
    assert canary(served) == CANARY
    assert not served.engine.streams
    assert not served.door.active


def test_the_error_says_what_came_and_what_is_allowed(served: Served) -> None:
    error = served.post(CHAT, chat(temperature="hot")).error
    assert error["message"] == 'temperature must be a number, got "hot"'
    error = served.post(CHAT, chat(top_k=1.5)).error
    assert error["message"] == "top_k must be an integer, got 1.5"


def test_a_prompt_over_the_context_gets_the_sentence_that_agents_match(served: Served) -> None:
    error = served.post(CHAT, chat(messages=[{"role": "user", "content": "x" * 600}], max_tokens=10)).error
    assert error["code"] == "context_length_exceeded"
    assert error["message"] == (
        "This model's maximum context length is 512 tokens. However, you requested 627 tokens (617 in the messages, "
        "10 in the completion). Please reduce the length of the messages or completion."
    )


def test_no_error_body_repeats_the_conversation(served: Served) -> None:
    secret = "correct horse battery staple"
    bad = [
        chat(messages=[{"role": "user", "content": secret}], temperature=-1),
        chat(messages=[{"role": "user", "content": [secret]}]),
        chat(messages=[{"role": "user", "content": {"a": secret}}]),
        chat(messages=secret),
        chat(messages=[secret]),
        chat(messages=[{"role": "user", "content": secret * 500}]),
    ]
    for body in bad:
        reply = served.post(CHAT, body)
        assert reply.status == 400
        assert "horse" not in reply.text
    for prompt in ({"a": secret}, [secret, 1], secret * 500):
        reply = served.post(COMPLETION, completion(prompt=prompt))
        assert reply.status == 400
        assert "horse" not in reply.text


def test_an_unknown_model_that_is_a_path_is_not_looked_up(served: Served) -> None:
    error = served.post(CHAT, chat(model="/etc/passwd")).error
    assert error["code"] == "model_not_found"
    assert "root" not in error["message"]


def test_unknown_fields_are_named_in_one_log_line(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        assert served.post(CHAT, chat(flux=1, warp="a\nb", user="me")).status == 200
    lines = [record.getMessage() for record in caplog.records if "flux" in record.getMessage()]
    assert len(lines) == 1
    assert "warnings" in lines[0] and "warp" in lines[0]
    assert "user" not in lines[0].partition("fields")[2]


def test_wrong_content_types_and_encodings_are_415(served: Served) -> None:
    data = json.dumps(chat()).encode()
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=utf-16"},
        {"Content-Type": "application/json", "Content-Encoding": "gzip"},
        {"Content-Type": "application/json", "Content-Encoding": "identity"},
    ):
        reply = served.send("POST", CHAT, data, headers)
        assert (reply.status, reply.error["type"]) == (415, "invalid_request_error"), headers
    assert served.send("POST", CHAT, data, {"Content-Type": "application/json; charset=UTF-8"}).status == 200


def test_a_body_without_content_type_is_taken_as_json(served: Served) -> None:
    data = json.dumps(chat()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode()
    with served.socket() as raw:
        raw.sendall(head + data)
        assert raw.recv(64).startswith(b"HTTP/1.1 200")


def test_wrong_methods_and_routes_are_json_errors(served: Served) -> None:
    reply = served.get(CHAT)
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert reply.error["code"] == "method_not_allowed"
    for path in ("/nothing", "/v1/../admin", "/v1/chat/completions/", "/%00", "/v1/models/none"):
        reply = served.get(path)
        assert (reply.status, reply.error["type"]) == (404, "invalid_request_error"), path
    assert served.send("PUT", "/health").status == 405


def test_a_huge_number_of_ignored_elements_costs_no_memory_and_little_time(served: Served) -> None:
    body = json.dumps(chat()).encode()[:-1] + b', "unknown": [' + b"[]," * 5_000_000 + b"[]]}"
    assert served.post(CHAT, body).status == 200


def test_streams_of_bad_requests_never_begin(served: Served) -> None:
    reply = served.post(CHAT, chat(stream=True, logit_bias={"9999": 1}))
    assert reply.status == 400
    assert events(reply.text) == [reply.text]
