"""One declaration of every field: what the routes read, what they check, and what the documents say, are the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.entrypoints.served import Served, serving
from tokenspeed.entrypoints import openapi, schema, schema_anthropic, schema_generate, schema_responses
from tokenspeed.entrypoints.app import make_app
from tokenspeed.entrypoints.body import Field, Fields
from tokenspeed.entrypoints.openapi import ROUTES, Route
from tokenspeed.entrypoints.routes_operation import _abort_request
from tokenspeed.entrypoints.routes_text import _detokenize_request, _tokenize_request
from tokenspeed.entrypoints.schema import Model
from tokenspeed.entrypoints.schema_chat import chat_request
from tokenspeed.entrypoints.schema_completion import completion_request
from tokenspeed.errors import InvalidRequest

PAGE = Path(__file__).parents[2] / "docs" / "api.md"
MODEL = Model(names=("echo",), max_model_len=512, vocab_size=260, defaults={})
USER = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f"}}
NOTHING_STORED = SimpleNamespace(conversation=lambda id: None, item=lambda id: None)

Parse = Callable[[bytes], object]
BODIES: dict[str, tuple[Parse, dict[str, Any]]] = {
    "/v1/chat/completions": (
        lambda body: chat_request(body, MODEL),
        {"model": "echo", "messages": USER, "tools": [TOOL], "stream": True, "stream_options": {}},
    ),
    "/v1/completions": (lambda body: completion_request(body, MODEL), {"model": "echo", "prompt": "x"}),
    "/v1/responses": (
        lambda body: schema_responses.responses_request(body, MODEL, NOTHING_STORED),
        {"model": "echo", "input": "x"},
    ),
    "/v1/messages": (
        lambda body: schema_anthropic.messages_request(body, MODEL),
        {"model": "echo", "messages": USER, "max_tokens": 5},
    ),
    "/v1/messages/count_tokens": (
        lambda body: schema_anthropic.count_request(body, MODEL),
        {"model": "echo", "messages": USER},
    ),
    "/generate": (lambda body: schema_generate.generate_request(body, MODEL), {"text": "x", "sampling_params": {}}),
    "/tokenize": (lambda body: _tokenize_request(body, MODEL), {"messages": USER}),
    "/detokenize": (lambda body: _detokenize_request(body, MODEL), {"tokens": [1]}),
    "/abort_request": (_abort_request, {"request_id": "x"}),
}
REFUSED = {
    *schema.UNSUPPORTED,
    *schema_responses.UNSUPPORTED,
    *schema_responses.NOT_HERE,
    *schema_anthropic.NOT_HERE,
    *schema_generate.NOT_HERE,
}
"""What routes read only to refuse it."""


def with_bodies() -> list[Route]:
    return [route for route in ROUTES if route.fields]


def parse(route: Route, **changes: Any) -> None:
    reader, body = BODIES[route.path]
    reader(json.dumps(body | changes).encode())


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the fields of bodies that are read while a test runs."""
    names: set[str] = set()
    real = Fields.raw

    def raw(self: Fields, key: str) -> bytes | None:
        if not self.name(""):
            names.add(key)
        return real(self, key)

    monkeypatch.setattr(Fields, "raw", raw)
    return names


def test_every_route_is_in_the_document_and_no_other() -> None:
    with serving() as served:
        there = {
            (route.method, str(route.resource.canonical))
            for route in make_app(served.door).router.routes()
            if route.resource is not None and route.method != "HEAD"
        }
    assert there == {(route.method, route.path) for route in ROUTES}
    assert {route.path for route in with_bodies()} == set(BODIES)


@pytest.mark.parametrize("route", with_bodies(), ids=lambda route: route.path)
def test_a_route_reads_the_fields_that_are_declared_for_it_and_no_other(route: Route, read: set[str]) -> None:
    parse(route)
    declared = {field.name for field in route.fields}
    inner = {name for field in route.fields if route.path == "/generate" for name in ours(field)}
    if route.path == "/v1/completions":
        inner |= set(schema.ONLY_CHAT)
    assert declared - read == set(), "declared, and never read"
    assert read - declared - inner - REFUSED == set(), "read, and not declared"


def ours(field: Field[Any]) -> set[str]:
    """Sampling parameters are read under our names wherever they come from."""
    from tokenspeed.entrypoints.fields import RENAMED  # noqa: PLC0415

    return {RENAMED[inner.name].name if inner.name in RENAMED else inner.name for inner in field.inner}


def ranged() -> Iterator[Any]:
    for route in with_bodies():
        for field in route.fields:
            for bound, beyond in ((field.least, -1), (field.above, 0), (field.most, 1)):
                if bound is not None:
                    yield pytest.param(route, field, bound + beyond, id=f"{route.path} {field.name} {bound + beyond}")


@pytest.mark.parametrize(("route", "field", "value"), list(ranged()))
def test_a_number_beyond_its_declared_range_is_refused_by_name(route: Route, field: Field[Any], value: float) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(route, **{field.name: value})
    assert refused.value.param == field.name


@pytest.mark.parametrize("route", with_bodies(), ids=lambda route: route.path)
def test_required_fields_are_required_and_only_they(route: Route) -> None:
    reader, body = BODIES[route.path]
    for field in route.fields:
        less = {key: value for key, value in body.items() if key != field.name}
        if field.required:
            with pytest.raises(InvalidRequest) as refused:
                reader(json.dumps(less).encode())
            assert refused.value.param == field.name
    required = {key: value for key, value in body.items() if any(f.required and f.name == key for f in route.fields)}
    if required:
        reader(json.dumps(required).encode())


@pytest.mark.parametrize("route", with_bodies(), ids=lambda route: route.path)
def test_a_value_of_another_type_is_refused_by_name(route: Route) -> None:
    for field in route.fields:
        wrong: Any = {"x": 1} if field.kind.allowed != "an object" else "x"
        if "object" in field.kind.allowed and field.kind.allowed != "an object":
            wrong = 1.5
        with pytest.raises(InvalidRequest) as refused:
            parse(route, **({"text": None} if field.name == "input_ids" else {}) | {field.name: wrong})
        assert (refused.value.param or "").split(".")[0] == field.name, field.name


def test_the_document_is_served_behind_the_key() -> None:
    with serving(user_keys=("k",)) as served:
        assert served.get("/openapi.json").status == 401
        got = served.get("/openapi.json", Authorization="Bearer k").json()
    assert got == json.loads(json.dumps(openapi.document()))
    assert got["openapi"] == "3.1.0"
    body = got["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["prompt", "model"]
    assert body["properties"]["top_p"] == {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": 1,
        "description": body["properties"]["top_p"]["description"],
        "default": 1.0,
    }
    assert got["paths"]["/health"]["get"]["security"] == []


def test_the_tables_of_the_documentation_are_those_of_the_declarations() -> None:
    """Renew them with `python -m tokenspeed.entrypoints.openapi --write docs/api.md`."""
    page = PAGE.read_text(encoding="utf-8")
    assert openapi.with_tables(page) == page


def test_the_command_prints_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    openapi.main([])
    assert json.loads(capsys.readouterr().out)["info"]["title"] == "TokenSpeed"


def test_every_route_of_the_document_that_only_reads_answers(served: Served) -> None:
    for route in ROUTES:
        if route.method == "GET":
            reply = served.get(route.path.replace("{id}", "x").replace("{name}", "echo"))
            assert reply.status in (200, 404) and (reply.status == 200 or "{id}" in route.path), route.path
