"""Keys guard every route but liveness; pages of foreign origins get nothing unless allowed."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.entrypoints.served import Served, chat, serving

GUARDED = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/echo"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/health_generate"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("POST", "/generate"),
    ("GET", "/v1/load"),
    ("GET", "/v1/loads"),
    ("GET", "/server_info"),
    ("GET", "/model_info"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing"),
    ("GET", "/v1/../admin"),
    ("OPTIONS", "/v1/models"),
]


@pytest.fixture(scope="module")
def guarded() -> Iterator[Served]:
    with serving(
        user_keys=("user-one", "user-two"), admin_keys=("boss",), allowed_origins=("https://app.example",)
    ) as it:
        yield it


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic user-one"},
        {"Authorization": "user-one"},
        {"Authorization": "Bearer sch\u00f6n"},
        {"Authorization": "Bearer user-one user-two"},
        {"x-api-key": "wrong"},
        {"x-api-key": ""},
    ],
    ids=str,
)
def test_every_route_but_liveness_needs_a_key(guarded: Served, method: str, path: str, headers: dict[str, str]) -> None:
    reply = guarded.send(method, path, headers=headers)
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert reply.error["type"] == "authentication_error"
    assert "user-one" not in reply.text


@pytest.mark.parametrize("key", ["user-one", "user-two", "boss"])
def test_any_configured_key_opens_the_door_in_either_header(guarded: Served, key: str) -> None:
    assert guarded.get("/v1/models", Authorization=f"Bearer {key}").status == 200
    assert guarded.get("/v1/models", authorization=f"bearer  {key}").status == 200
    assert guarded.get("/v1/models", x_api_key=key).status == 200
    assert guarded.post("/v1/chat/completions", chat(), Authorization=f"Bearer {key}").status == 200


def test_liveness_needs_no_key(guarded: Served) -> None:
    assert guarded.get("/health").status == 200
    assert guarded.get("/ready").status == 200


def test_admin_routes_tell_a_user_from_nobody(guarded: Served) -> None:
    body = {"request_id": "nothing"}
    nobody = guarded.post("/abort_request", body)
    user = guarded.post("/abort_request", body, Authorization="Bearer user-one")
    boss = guarded.post("/abort_request", body, Authorization="Bearer boss")
    assert (nobody.status, user.status, boss.status) == (401, 403, 404)
    assert user.error["type"] == "permission_error"


@pytest.mark.parametrize("path", ["/flush_cache", "/reset_prefix_cache"])
def test_only_an_admin_flushes_the_cache(guarded: Served, path: str) -> None:
    assert guarded.post(path, {}).status == 401
    assert guarded.post(path, {}, Authorization="Bearer user-one").status == 403
    flushed = guarded.send("POST", path, headers={"Authorization": "Bearer boss"})
    assert flushed.status == 200 and json.loads(flushed.text) == {"dropped_blocks": 3, "held_blocks": 0}


def test_without_keys_everything_is_open_but_the_admin_routes(served: Served) -> None:
    assert served.get("/v1/models").status == 200
    assert served.post("/abort_request", {"request_id": "x"}).status == 403


def test_an_allowed_origin_may_ask_and_read(guarded: Served) -> None:
    origin = "https://app.example"
    before = guarded.send("OPTIONS", "/v1/chat/completions", headers={"Origin": origin})
    assert before.status == 204
    assert before.headers["access-control-allow-origin"] == origin
    assert "POST" in before.headers["access-control-allow-methods"]
    assert "Authorization" in before.headers["access-control-allow-headers"]
    for stream in (False, True):
        reply = guarded.post("/v1/chat/completions", chat(stream=stream), Authorization="Bearer boss", Origin=origin)
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (200, origin)
    refused = guarded.post("/v1/chat/completions", chat(), Origin=origin)
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, origin)


def test_other_origins_get_nothing(guarded: Served, served: Served) -> None:
    evil = {"Origin": "https://evil.example"}
    reply = guarded.send("OPTIONS", "/v1/chat/completions", headers=evil)
    assert reply.status == 401
    assert "access-control-allow-origin" not in reply.headers
    reply = served.post("/v1/chat/completions", chat(), **evil)
    assert "access-control-allow-origin" not in reply.headers
    assert served.send("OPTIONS", "/v1/chat/completions", headers=evil).status == 405
