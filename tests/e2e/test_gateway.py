"""The real gateway before two real engines: what clients get, and what becomes of it when they or an engine leave."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as stubs

from tests.e2e.server import free_port, serving

MODEL = "SmolLM2-135M-Instruct"
CAPITAL = [{"role": "user", "content": "What is the capital of Japan?"}]
TOKYO = "The capital of Japan is Tokyo."
GREEDY: dict[str, Any] = {"model": MODEL, "temperature": 0}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class Fleet:
    """`python -m tokenspeed serve` with two engines."""

    def __init__(self, log: Path) -> None:
        self.port, prometheus = free_port(), free_port()
        self.ports = _neighbours()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            sys.executable, "-m", "tokenspeed", "serve", "--workers", "2", "--port", str(self.port),
            "--worker-port", str(self.ports[0]), "--kv-cache-memory", "256MiB", "--shutdown-grace", "1",
            "--", "--prometheus-port", str(prometheus), "--prometheus-host", "127.0.0.1",
        ]  # fmt: skip
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of an answer."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def workers(self) -> list[dict[str, Any]]:
        """The engines that the gateway has found."""
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return list(self.ask("/workers")["workers"])
        return []

    def load(self, port: int) -> pb.SchedulerLoad:
        """What an engine says of its load."""
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            return stubs.TokenSpeedSchedulerStub(channel).GetLoads(pb.GetLoadsRequest(), timeout=5).loads[0]

    def engine_pid(self, port: int) -> int:
        """The process that serves on an engine's port."""
        found = subprocess.check_output(["pgrep", "-f", f"entrypoints.grpc .*--port {port} "], text=True)
        return int(found.split()[0])

    def wait_until(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.02)


def _neighbours() -> tuple[int, int]:
    """Two free ports, one after the other."""
    while True:
        first = free_port()
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", first + 1)):
            return first, first + 1


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("fleet") / "log")
    try:
        fleet.wait_until(lambda: len([worker for worker in fleet.workers() if worker["is_healthy"]]) == 2)
        fleet.wait_until(lambda: fleet.ask("/v1/models")["data"] != [])
        yield fleet
    finally:
        fleet.process.send_signal(signal.SIGTERM)
        try:
            fleet.process.wait(40)
        except subprocess.TimeoutExpired:
            fleet.process.kill()
            raise
    assert fleet.process.returncode == 0, fleet.log.read_text()[-3000:]


@pytest.fixture(scope="module")
def client(fleet: Fleet) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{fleet.url}/v1", api_key="none") as client:
        yield client


def test_both_engines_are_found_for_what_they_are(fleet: Fleet) -> None:
    for worker in fleet.workers():
        assert (worker["runtime_type"], worker["connection_mode"]) == ("tokenspeed", "grpc")
        assert worker["model_id"] == MODEL and worker["models"][0]["context_length"] == 8192
        assert worker["labels"]["architectures"] == '["LlamaForCausalLM"]'


def test_a_chat_is_the_same_whole_and_streamed_and_its_usage_is_right(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(messages=CAPITAL, max_tokens=20, **GREEDY)  # type: ignore[call-overload]
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (TOKYO, "stop")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (37, 8)
    chunks = list(
        client.chat.completions.create(  # type: ignore[call-overload]
            messages=CAPITAL, max_tokens=20, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert said == TOKYO
    assert chunks[-1].usage.completion_tokens == 8
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"


def test_completions_messages_and_responses_are_served(fleet: Fleet) -> None:
    completion = fleet.ask("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 2, "n": 2, **GREEDY})
    assert [choice["text"] for choice in completion["choices"]] == [" Paris."] * 2
    assert [choice["finish_reason"] for choice in completion["choices"]] == ["length"] * 2
    message = fleet.ask("/v1/messages", {"messages": CAPITAL, "max_tokens": 20, **GREEDY})
    assert (message["content"][0]["text"], message["stop_reason"]) == (TOKYO, "end_turn")
    cut = fleet.ask("/v1/messages", {"messages": CAPITAL, "max_tokens": 20, "stop_sequences": [" Japan"], **GREEDY})
    assert (cut["content"][0]["text"], cut["stop_reason"]) == ("The capital of", "stop_sequence")
    assert cut["stop_sequence"] == " Japan"
    response = fleet.ask("/v1/responses", {"input": CAPITAL[0]["content"], "max_output_tokens": 20, **GREEDY})
    assert response["output"][0]["content"][0]["text"] == TOKYO


def test_tools_and_schemas_are_kept_by_the_engine_and_parsed_by_the_gateway(client: openai.OpenAI) -> None:
    called = client.chat.completions.create(  # type: ignore[call-overload]
        messages=[{"role": "user", "content": "The weather in Paris?"}],
        tools=[WEATHER],
        tool_choice="required",
        max_tokens=80,
        **GREEDY,
    )
    call = called.choices[0].message.tool_calls[0]
    assert (called.choices[0].finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert set(json.loads(call.function.arguments)) == {"city"}
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    shaped = client.chat.completions.create(  # type: ignore[call-overload]
        messages=[{"role": "user", "content": "An age."}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema | {"additionalProperties": False}},
        },
        max_tokens=60,
        **GREEDY,
    )
    assert isinstance(json.loads(shaped.choices[0].message.content)["age"], int)


def test_log_probabilities_come_one_for_each_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(  # type: ignore[call-overload]
        messages=CAPITAL, max_tokens=20, logprobs=True, top_logprobs=2, **GREEDY
    )
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == TOKYO
    assert all(entry.top_logprobs[0].token == entry.token and entry.logprob <= 0 for entry in entries)


def test_a_conversation_goes_back_to_where_its_prefix_is_cached(fleet: Fleet, client: openai.OpenAI) -> None:
    """Of two engines; every block that the first turns left is found by the second."""
    draw = random.Random(5)
    talks: list[list[dict[str, str]]] = [
        [{"role": "user", "content": " ".join(f"word{draw.randrange(1000)}" for _ in range(150))}] for _ in range(6)
    ]
    left = []
    for talk in talks:
        answer = client.chat.completions.create(messages=talk, max_tokens=8, **GREEDY)  # type: ignore[call-overload]
        left.append((answer.usage.prompt_tokens + answer.usage.completion_tokens - 1) // 64 * 64)
        talk += [
            {"role": "assistant", "content": answer.choices[0].message.content},
            {"role": "user", "content": "Go on."},
        ]
    for talk, expected in zip(talks, left, strict=True):
        answer = client.chat.completions.create(messages=talk, max_tokens=8, **GREEDY)  # type: ignore[call-overload]
        assert answer.usage.prompt_tokens_details.cached_tokens >= expected > 0
    assert all(fleet.load(port).cache_hit_rate > 0 for port in fleet.ports), "one engine got all conversations"


def test_a_client_that_leaves_the_gateway_frees_its_request_in_the_engine(fleet: Fleet, client: openai.OpenAI) -> None:
    def running() -> int:
        return sum(fleet.load(port).num_running_reqs for port in fleet.ports)

    stream = client.chat.completions.create(  # type: ignore[call-overload]
        messages=[{"role": "user", "content": "Count to a million."}],
        max_tokens=7000,
        stream=True,
        extra_body={"ignore_eos": True},
        **GREEDY,
    )
    next(iter(stream))
    fleet.wait_until(lambda: running() == 1)
    stream.close()
    fleet.wait_until(lambda: running() == 0, seconds=10)


def test_what_the_engine_refuses_is_refused_with_its_reason(fleet: Fleet) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        fleet.ask("/v1/completions", {"prompt": "a", "max_tokens": 30000, **GREEDY})
    assert refused.value.code == 400
    assert "maximum context length is 8192 tokens" in json.load(refused.value)["error"]["message"]


def test_an_engine_that_is_killed_is_started_again_and_the_other_one_serves_meanwhile(fleet: Fleet) -> None:
    killed = fleet.engine_pid(fleet.ports[0])
    os.kill(killed, signal.SIGKILL)
    for _ in range(6):
        answer = fleet.ask("/v1/chat/completions", {"messages": CAPITAL, "max_tokens": 20, **GREEDY})
        assert answer["choices"][0]["message"]["content"] == TOKYO

    def back() -> bool:
        with contextlib.suppress(grpc.RpcError):
            return fleet.load(fleet.ports[0]).max_total_num_tokens > 0
        return False

    fleet.wait_until(back)
    assert fleet.engine_pid(fleet.ports[0]) != killed


def test_both_doors_of_one_engine_give_the_same_tokens(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path / "log", "--grpc-port", str(port), "--kv-cache-memory", "64MiB") as server:
        ids = [504, 3575, 282, 4649, 314]
        body = {"model": MODEL, "prompt": ids, "max_tokens": 24, "temperature": 0, "return_token_ids": True}
        request = urllib.request.Request(
            f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            over_http = json.load(answer)["choices"][0]["token_ids"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            asked = pb.GenerateRequest(
                request_id="same",
                tokenized=pb.TokenizedInput(input_ids=ids),
                sampling_params=pb.SamplingParams(temperature=0, max_new_tokens=24, no_stop_trim=True),
                stream=True,
            )
            messages = list(stubs.TokenSpeedSchedulerStub(channel).Generate(asked, timeout=30))
        over_grpc = [id for message in messages for id in message.chunk.token_ids]
        assert over_grpc == over_http
        assert messages[-1].complete.completion_tokens == len(over_grpc) > 0
        assert server.metric("request_success_total") == 2
