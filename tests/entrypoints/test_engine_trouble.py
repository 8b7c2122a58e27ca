"""The engine loads, drains, fails or dies: what clients and probes are told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints.fake_engine import Health
from tests.entrypoints.served import Reply, Served, chat, completion, events, serving
from tokenspeed.engine.admission import as_error
from tokenspeed.engine.messages import Refused

ROUTES = ("/v1/chat/completions", "/v1/completions")


@pytest.fixture
def fragile() -> Iterator[Served]:
    with serving() as it:
        yield it


def set_health(served: Served, health: Health) -> None:
    served.call(lambda: setattr(served.engine, "state", health))


@pytest.mark.parametrize(
    ("health", "alive", "code"),
    [
        (Health("loading"), 503, "loading"),
        (Health("draining"), 200, "draining"),
        (Health("dead", "it broke"), 503, "engine_dead"),
        (Health("ready", None, 60.0), 503, "engine_silent"),
    ],
    ids=["loading", "draining", "dead", "silent"],
)
def test_an_engine_that_does_not_serve_is_503_with_a_retry_time(
    fragile: Served, health: Health, alive: int, code: str
) -> None:
    set_health(fragile, health)
    assert fragile.get("/health").status == alive
    assert fragile.get("/ready").status == 503
    for reply in (
        *(fragile.post(route, body) for route in ROUTES for body in (chat(), chat(stream=True))),
        fragile.post("/tokenize", {"prompt": "x"}),
        fragile.get("/v1/models"),
        fragile.get("/health_generate"),
        fragile.get("/ready"),
    ):
        assert (reply.status, reply.error["code"]) == (503, code)
        assert int(reply.headers["retry-after"]) > 0
        assert "it broke" not in reply.text
    set_health(fragile, Health())
    assert fragile.post(ROUTES[0], chat()).status == 200


def test_a_full_queue_is_429_with_a_retry_time_for_all_prompts_of_a_batch(fragile: Served) -> None:
    fragile.call(lambda: setattr(fragile.engine, "queue_limit", 2))
    reply = fragile.post("/v1/completions", completion(prompt=["a", "b", "c"], stream=True))
    assert (reply.status, reply.headers["retry-after"]) == (429, "2")
    assert reply.error["type"] == "rate_limit_error"
    fragile.wait_until(lambda: not fragile.engine.streams)
    assert len(fragile.engine.aborted) == 2


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("reason", ["QUEUE_FULL", "FLOOR", "NO_ROOM"])
def test_overload_is_429_with_its_reason_and_a_retry_time(fragile: Served, route: str, reason: str) -> None:
    refusal = as_error(Refused(id=1, reason=reason, retry_after=17))
    fragile.call(lambda: setattr(fragile.engine, "refusal", refusal))
    for stream in (False, True):
        body = chat(stream=stream) if "chat" in route else completion(stream=stream)
        reply = fragile.post(route, body)
        assert (reply.status, reply.headers["retry-after"]) == (429, "17")
        assert (reply.error["type"], reply.error["code"]) == ("rate_limit_error", reason.lower())
    fragile.call(lambda: setattr(fragile.engine, "refusal", None))
    assert fragile.post(route, body).status == 200


@pytest.mark.parametrize("route", ROUTES)
def test_a_floor_that_no_wait_could_ever_bring_is_400_and_names_its_field(fragile: Served, route: str) -> None:
    refusal = as_error(Refused(id=1, reason="FLOOR_OUT_OF_REACH", retry_after=17))
    fragile.call(lambda: setattr(fragile.engine, "refusal", refusal))
    for stream in (False, True):
        body = chat(stream=stream) if "chat" in route else completion(stream=stream)
        reply = fragile.post(route, body | {"tps_floor": 1e9})
        assert (reply.status, reply.error["type"], reply.error["param"]) == (400, "invalid_request_error", "tps_floor")
        assert "retry-after" not in reply.headers


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_that_fails_before_its_answer_is_500(fragile: Served, route: str) -> None:
    fragile.call(lambda: setattr(fragile.engine, "fail_after", 2))
    body = chat() if "chat" in route else completion()
    reply = fragile.post(route, body)
    assert (reply.status, reply.error["type"]) == (500, "server_error")
    assert "not finite" in reply.error["message"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("knob", "kind"), [("fail_after", "server_error"), ("die_after", "service_unavailable_error")])
def test_a_failure_in_mid_stream_is_one_error_event_and_no_done(
    fragile: Served, route: str, knob: str, kind: str
) -> None:
    fragile.call(lambda: setattr(fragile.engine, knob, 4))
    body = chat(stream=True) if "chat" in route else completion(stream=True)
    reply = fragile.post(route, body)
    assert reply.status == 200
    got = events(reply.text)
    assert "choices" in got[0]
    assert set(got[-1]) == {"error"}
    assert got[-1]["error"]["type"] == kind
    assert "[DONE]" not in got
    fragile.wait_until(lambda: not fragile.engine.streams and not fragile.door.active)


def test_one_of_several_prompts_failing_ends_them_all(fragile: Served) -> None:
    fragile.call(lambda: setattr(fragile.engine, "die_after", 3))
    reply = fragile.post("/v1/completions", completion(prompt=["abcd", "efgh"]))
    assert reply.status == 503
    fragile.wait_until(lambda: not fragile.engine.streams and not fragile.door.active)


def test_health_generate_asks_for_one_real_token(fragile: Served) -> None:
    before = fragile.engine.generated
    assert fragile.get("/health_generate").status == 200
    assert fragile.engine.generated == before + 1
    fragile.call(lambda: setattr(fragile.engine, "fail_after", 0))
    assert fragile.get("/health_generate").status == 503


def test_a_drain_lets_admitted_streams_end_and_refuses_new_ones(fragile: Served) -> None:
    fragile.call(lambda: setattr(fragile.engine, "delay", 0.04))
    replies: list[Reply] = []
    running = threading.Thread(
        target=lambda: replies.append(fragile.post("/v1/completions", completion(stream=True, max_tokens=12)))
    )
    running.start()
    fragile.wait_until(lambda: bool(fragile.engine.streams))
    stopping = threading.Thread(target=lambda: fragile.run(fragile.server.stop(10.0)))
    stopping.start()
    fragile.wait_until(lambda: fragile.door.draining)
    refused = fragile.post("/v1/completions", completion())
    assert (refused.status, refused.error["code"]) == (503, "draining")
    assert refused.headers["connection"] == "close"
    assert fragile.get("/ready").status == 503
    assert fragile.get("/health").status == 200
    running.join()
    stopping.join()
    assert events(replies[0].text)[-1] == "[DONE]"
    with pytest.raises(OSError):
        fragile.get("/health")


def test_a_drain_that_takes_too_long_aborts_what_is_left(fragile: Served) -> None:
    fragile.call(fragile.engine.gate.clear)
    replies: list[Any] = []
    running = threading.Thread(target=lambda: replies.append(fragile.post("/v1/completions", completion(stream=True))))
    running.start()
    fragile.wait_until(lambda: bool(fragile.engine.streams))
    began = time.monotonic()
    fragile.run(fragile.server.stop(0.2))
    running.join()
    assert time.monotonic() - began < 20.0  # the grace of a stop is 30 unless told
    assert events(replies[0].text)[0]["choices"][0]["finish_reason"] == "abort"


POOL_METRICS = {"requests_running": ["2.0", "1.0"], "requests_waiting": ["0.0", "4.0"], "usage_perc": ["0.2", "0.8"]}


def test_metrics_tell_what_happened(fragile: Served) -> None:
    for stream in (False, True):
        fragile.post("/v1/chat/completions", chat(stream=stream, max_tokens=5))
    fragile.post("/v1/completions", completion(max_tokens=9, stop="l"))
    fragile.call(lambda: fragile.engine.refusals.update(floor=2))
    lines = dict(line.rsplit(" ", 1) for line in fragile.get("/metrics").text.splitlines() if not line.startswith("#"))
    assert lines['tokenspeed:request_success_total{finished_reason="length"}'] == "2.0"
    assert lines['tokenspeed:request_success_total{finished_reason="stop"}'] == "1.0"
    assert lines["tokenspeed:time_to_first_token_seconds_count"] == "3.0"
    assert lines["tokenspeed:e2e_request_latency_seconds_count"] == "3.0"
    assert lines["tokenspeed:inter_token_latency_seconds_count"] == str(4.0 + 4.0 + 2.0)
    assert lines['tokenspeed:inter_token_latency_seconds_bucket{le="+Inf"}'] == "10.0"
    assert lines["tokenspeed:request_queue_time_seconds_count"] == "3.0"
    assert lines["tokenspeed:generation_tokens_total"] == "13.0"
    assert lines["tokenspeed:num_requests_running"] == "0.0"
    assert lines["tokenspeed:num_sessions_resident"] == "3.0"
    assert lines["tokenspeed:num_sessions_waiting"] == "1.0"
    assert lines["tokenspeed:host_blocks_used"] == "0.0"
    assert lines['tokenspeed:num_refused_total{reason="floor"}'] == "2.0"
    assert lines['tokenspeed:num_refused_total{reason="no_room"}'] == "0.0"
    of_pools = {name: [lines[f'tokenspeed:pool_{name}{{pool="{pool}"}}'] for pool in range(2)] for name in POOL_METRICS}
    assert of_pools == POOL_METRICS
    for name in ("prompt_tokens_total", "prompt_tokens_cached_total", "num_preemptions_total", "kv_cache_usage_perc"):
        assert f"tokenspeed:{name}" in lines


def test_the_server_tells_its_version_and_not_its_library(fragile: Served) -> None:
    reply = fragile.get("/version")
    assert set(json.loads(reply.text)) == {"version"}
    assert reply.headers["server"] == "tokenspeed"
