"""What operators and gateways read: metrics under two engines' names, the dashboard, load, server and model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.entrypoints.fake_engine import Health
from tests.entrypoints.served import Served, chat, completion, serving

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture(scope="module")
def compatible() -> Iterator[Served]:
    with serving(metrics_compat="vllm", served_names=("coder",)) as it:
        assert it.post("/v1/chat/completions", chat(model="coder", max_tokens=5)).status == 200
        it.call(lambda: [it.engine.steps.seconds.observe(0.02, 3), it.engine.steps.tokens.observe(40.0)])
        yield it


def samples(served: Served) -> dict[str, float]:
    lines = (line for line in served.get("/metrics").text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_steps_and_streams_below_their_floor_come_from_the_engine(compatible: Served) -> None:
    got = samples(compatible)
    assert got["tokenspeed:streams_below_floor"] == 2
    assert got['tokenspeed:step_seconds_bucket{le="0.0143"}'] == 0
    assert got['tokenspeed:step_seconds_bucket{le="0.02"}'] == 3
    assert got["tokenspeed:step_seconds_sum"] == pytest.approx(0.06)
    assert (got["tokenspeed:iteration_tokens_total_sum"], got["tokenspeed:iteration_tokens_total_count"]) == (40, 1)
    assert got["tokenspeed:engine_restarts_total"] == 0


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("num_requests_running", "num_requests_running"),
        ("num_requests_waiting", "num_requests_waiting"),
        ("kv_cache_usage_perc", "kv_cache_usage_perc"),
        ("prompt_tokens_total", "prompt_tokens_total"),
        ("prompt_tokens_total", "prefix_cache_queries_total"),
        ("prompt_tokens_cached_total", "prefix_cache_hits_total"),
        ("generation_tokens_total", "generation_tokens_total"),
        ("num_preemptions_total", "num_preemptions_total"),
        ("time_to_first_token_seconds_count", "time_to_first_token_seconds_count"),
        ("inter_token_latency_seconds_sum", "inter_token_latency_seconds_sum"),
        ("e2e_request_latency_seconds_count", "e2e_request_latency_seconds_count"),
        ("request_queue_time_seconds_count", "request_queue_time_seconds_count"),
        ("iteration_tokens_total_sum", "iteration_tokens_total_sum"),
    ],
)
def test_the_names_of_vllm_have_the_same_values_and_its_labels(compatible: Served, ours: str, theirs: str) -> None:
    got = samples(compatible)
    assert got[f'vllm:{theirs}{{engine="0",model_name="coder"}}'] == got[f"tokenspeed:{ours}"]


def test_labels_of_our_own_stay_beside_those_of_vllm(compatible: Served) -> None:
    got = samples(compatible)
    assert got['vllm:request_success_total{engine="0",finished_reason="length",model_name="coder"}'] == 1
    assert got['vllm:iteration_tokens_total_bucket{engine="0",le="64.0",model_name="coder"}'] == 1


def test_without_the_flag_there_are_no_other_names(served: Served) -> None:
    assert "vllm:" not in served.get("/metrics").text


def test_the_dashboard_uses_only_metrics_that_exist(compatible: Served) -> None:
    shown = {name.partition("{")[0] for name in samples(compatible)}
    dashboard = json.loads(DASHBOARD.read_text())
    used = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"tokenspeed:\w+", target["expr"])
    }
    assert len(used) > 15
    assert used <= shown, used - shown


@pytest.mark.parametrize("route", ["/v1/load", "/v1/loads"])
def test_load_tells_how_busy_the_engine_is(served: Served, route: str) -> None:
    served.call(served.engine.gate.clear)
    with served.socket() as raw:
        body = json.dumps(completion(stream=True)).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        served.wait_until(lambda: bool(served.engine.streams))
        got = served.get(route).json()
        served.call(served.engine.gate.set)
        served.wait_until(lambda: not served.engine.streams)
    assert (got["num_requests_running"], got["num_requests_waiting"], got["streams_below_floor"]) == (1, 0, 2)
    assert (got["num_sessions_resident"], got["num_sessions_waiting"]) == (3, 1)
    (rank,) = got["loads"]
    assert (rank["dp_rank"], rank["num_running_reqs"], rank["num_total_reqs"]) == (0, 1, 1)
    assert rank["max_total_num_tokens"] == 6400
    assert served.get(route).json()["num_requests_running"] == 0


def test_a_gateway_learns_what_serves_here(served: Served) -> None:
    for route in ("/server_info", "/get_server_info"):
        server = served.get(route).json()
        assert (server["served_model_name"], server["context_length"]) == ("echo", 512)
        assert (server["max_total_tokens"], server["max_running_requests"], server["tp_size"]) == (6400, 64, 1)
        assert "num_running_reqs" in server["internal_states"][0]
    for route in ("/model_info", "/get_model_info"):
        model = served.get(route).json()
        assert (model["model_type"], model["architectures"], model["is_generation"]) == (
            "echo",
            ["EchoForCausalLM"],
            True,
        )
        assert (model["vocab_size"], model["max_model_len"], model["eos_token_ids"]) == (260, 512, [257])


@pytest.mark.parametrize("route", ["/v1/load", "/v1/loads", "/server_info", "/model_info"])
def test_an_engine_that_is_restarted_has_no_load_and_says_when_to_ask_again(served: Served, route: str) -> None:
    served.call(lambda: setattr(served.engine, "state", Health("restarting", "it broke")))
    reply, health = served.get(route), served.get("/health")
    served.call(lambda: setattr(served.engine, "state", Health()))
    assert (reply.status, reply.error["code"]) == (health.status, health.error["code"]) == (503, "engine_restarting")
    assert int(reply.headers["retry-after"]) > 0
    assert "it broke" not in reply.text


def test_facts_of_an_engine_that_took_over_are_used() -> None:
    with serving() as served:
        assert served.get("/v1/models").json()["data"][0]["max_model_len"] == 512
        served.call(lambda: setattr(served.engine, "facts", type(served.engine.facts)(max_model_len=256)))
        assert served.get("/v1/models").json()["data"][0]["max_model_len"] == 256
