"""Whatever is sent to /v1/responses: the right status in OpenAI's error shape, the field named, nobody else hurt."""

from __future__ import annotations

from typing import Any

import pytest

from tests.entrypoints.corpus import BAD_BODIES, Case
from tests.entrypoints.corpus_responses import BAD_FIELDS_HERE, FINE, ROUTE
from tests.entrypoints.served import Served


def body(changes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    made = {"model": "echo", "input": "hello", "max_output_tokens": 8, **fields, **changes}
    return {key: value for key, value in made.items() if value is not ...}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", BAD_FIELDS_HERE, ids=lambda case: case.name)
def test_a_bad_field_is_refused_by_name_before_anything_is_streamed(served: Served, case: Case, stream: bool) -> None:
    if not stream and "stream_options" in case.changes:
        return
    reply = served.post(ROUTE, body(case.changes, stream=stream))
    assert reply.status == case.status, reply.text
    assert reply.headers["content-type"].startswith("application/json")
    assert (reply.error["param"], reply.error["type"]) == (case.param, "invalid_request_error")
    assert not served.engine.streams


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("case", FINE, ids=lambda case: case.name)
def test_what_is_fine_is_served(served: Served, case: Case, stream: bool) -> None:
    reply = served.post(ROUTE, body(case.changes, stream=stream, store=True))
    assert reply.status == 200, reply.text
    assert ("event: response.completed" in reply.text) is stream


@pytest.mark.parametrize(("name", "data"), BAD_BODIES)
def test_a_body_that_is_no_json_object_is_refused(served: Served, name: str, data: bytes) -> None:
    reply = served.post(ROUTE, data.replace(b'"prompt"', b'"input"'))
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error"), reply.text


def test_all_bad_requests_together_leave_nothing_behind(served: Served) -> None:
    def canary() -> str:
        return str(served.post(ROUTE, body({"input": "the canary"})).json()["output"][0]["content"][0]["text"])

    before = canary()
    for case in BAD_FIELDS_HERE:
        served.post(ROUTE, body(case.changes, store=True))
    assert canary() == before
    assert not served.engine.streams and not served.door.active


def test_no_error_body_repeats_the_conversation(served: Served) -> None:
    secret = "correct horse battery staple"
    for bad in (
        {"input": {"a": secret}},
        {"input": [secret]},
        {"input": [{"role": "user", "content": {"a": secret}}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": secret}]}]},
        {"input": [{"type": "function_call_output", "output": 5, "call_id": secret}]},
        {"input": [{"type": "item_reference", "id": secret}]},
        {"input": secret * 500},
        {"previous_response_id": secret},
        {"instructions": [secret]},
        {"metadata": {secret: 1}},
    ):
        reply = served.post(ROUTE, body(bad))
        assert reply.status == 400 and "horse" not in reply.text, bad


def test_unknown_responses_and_wrong_methods_are_json_errors(served: Served) -> None:
    for method, path in (("GET", "/x"), ("DELETE", "/x"), ("POST", "/x/cancel"), ("GET", "/x/input_items")):
        reply = served.send(method, ROUTE + path)
        assert (reply.status, reply.error["type"]) == (404, "invalid_request_error")
    for method, path, allowed in (("GET", "", "POST"), ("PUT", "/resp_x", "DELETE, GET"), ("GET", "/x/cancel", "POST")):
        reply = served.send(method, ROUTE + path)
        assert (reply.status, reply.headers["allow"]) == (405, allowed)
