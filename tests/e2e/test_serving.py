"""The whole path over a real socket, with the real `openai` client and a toy checkpoint."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import pytest

from tests.e2e.server import Server, get, serving
from tests.toy import toy_llama

QUESTION = [
    {"role": "system", "content": "You write small programs and explain them line by line. " * 6},
    {"role": "user", "content": "Reverse a list in Python."},
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    toy_llama(folder / "toy", seed=5, max_position_embeddings=4096)
    flags = ["--model", str(folder / "toy"), "--dtype", "float32", "--block-size", "16", "--num-threads", "1"]
    with serving(folder / "log", *flags, "--max-num-batched-tokens", "512", "--admin-api-key", "admin") as running:
        yield running


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_chat_gives_the_same_text_streamed_or_not(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=30, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="toy",
            messages=QUESTION,
            max_tokens=30,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and text
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content is not None
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 30
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_completions_give_the_same_text_streamed_or_not(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="toy", prompt="def reverse(", max_tokens=30, temperature=0)
    chunks = client.completions.create(model="toy", prompt="def reverse(", max_tokens=30, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""


def test_the_second_turn_finds_the_first_in_the_cache(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model="toy", messages=QUESTION, max_tokens=40, temperature=0)
    history = [
        *QUESTION,
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Shorter."},
    ]
    second = client.chat.completions.create(model="toy", messages=history, max_tokens=5, temperature=0)
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached > 0.9 * first.usage.prompt_tokens
    again = client.chat.completions.create(model="toy", messages=history, max_tokens=5, temperature=0)
    assert again.usage.prompt_tokens_details.cached_tokens > 0.9 * again.usage.prompt_tokens
    assert again.choices[0].message.content == second.choices[0].message.content


def test_a_bad_request_is_a_400_and_hurts_nobody(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="toy", messages=QUESTION, temperature=-1)
    assert refused.value.body["param"] == "temperature"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="toy", prompt=[1] * 4090, max_tokens=100)
    assert refused.value.body["code"] == "context_length_exceeded"
    sentence = "This model's maximum context length is 4096 tokens. However, you requested 4190 tokens"
    assert sentence in str(refused.value)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=QUESTION)
    assert get(f"{server.url}/health")[0] == 200


def test_health_metrics_and_version_answer(server: Server) -> None:
    for path in ("/health", "/ready", "/health_generate", "/metrics", "/version", "/v1/models"):
        status, body = get(server.url + path)
        assert status == 200, (path, body)
    models = json.loads(get(f"{server.url}/v1/models")[1])
    assert models["data"][0]["max_model_len"] == 4096


async def at_rest(server: Server, seconds: float = 5.0) -> None:
    """Running, waiting and used blocks are all zero soon."""
    end = time.monotonic() + seconds
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    while time.monotonic() < end:
        if [await asyncio.to_thread(server.metric, name) for name in names] == [0, 0, 0]:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(get(f"{server.url}/metrics")[1])


def test_200_streams_a_third_of_them_dropped_leave_nothing_behind(server: Server) -> None:
    draw = random.Random(1)
    canary = {"model": "toy", "prompt": "canary", "max_tokens": 12, "temperature": 0}

    async def one(session: aiohttp.ClientSession, index: int, drop_after: int | None) -> str:
        body = {"model": "toy", "prompt": f"stream {index} " * 12, "max_tokens": 60, "stream": True, "ignore_eos": True}
        if drop_after is not None:
            await asyncio.sleep(draw.random())
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            assert response.status == 200
            last, lines = b"", 0
            async for line in response.content:
                if line.strip():
                    last, lines = line.strip(), lines + 1
                if drop_after is not None and lines > drop_after:
                    response.close()
                    return "dropped"
        return "done" if last == b"data: [DONE]" else last.decode()

    async def run() -> list[str]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            async with session.post(f"{server.url}/v1/completions", json=canary) as response:
                before = (await response.json())["choices"][0]["text"]
            jobs = [one(session, i, draw.randrange(20) if i % 3 == 0 else None) for i in range(200)]
            ends = await asyncio.gather(*jobs)
            await at_rest(server)
            async with session.post(f"{server.url}/v1/completions", json=canary) as response:
                assert (await response.json())["choices"][0]["text"] == before
        return ends

    ends = asyncio.run(run())
    assert ends == ["done" if index % 3 else "dropped" for index in range(200)]
    assert server.metric("num_aborts_total") >= ends.count("dropped") / 2, "the others were done before it was seen"
    assert server.metric("slowest_abort_steps") <= 2 or server.metric("slowest_abort_seconds") <= 0.1


def test_ctrl_c_lets_admitted_streams_end_and_exits_0(tmp_path: Path) -> None:
    toy_llama(tmp_path / "toy")
    with serving(tmp_path / "log", "--model", str(tmp_path / "toy"), "--num-threads", "1") as server:

        async def run() -> bytes:
            body = {"model": "toy", "prompt": "once", "max_tokens": 300, "stream": True, "ignore_eos": True}
            last = b""
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{server.url}/v1/completions", json=body) as response,
            ):
                first = True
                async for line in response.content:
                    if first:
                        server.process.send_signal(signal.SIGINT)
                        first = False
                    if line.strip():
                        last = line.strip()
            return last

        assert asyncio.run(run()) == b"data: [DONE]"
        assert server.process.wait(20) == 0


def test_a_killed_engine_ends_its_streams_turns_health_to_503_and_is_replaced(tmp_path: Path) -> None:
    toy_llama(tmp_path / "toy", max_position_embeddings=8192)
    with serving(tmp_path / "log", "--model", str(tmp_path / "toy"), "--num-threads", "1") as server:

        async def run() -> tuple[bytes, float]:
            body = {"model": "toy", "prompt": "once", "max_tokens": 8000, "stream": True, "ignore_eos": True}
            lines = []
            killed = 0.0
            async with (
                aiohttp.ClientSession() as session,
                session.post(f"{server.url}/v1/completions", json=body) as response,
            ):
                async for line in response.content:
                    if not lines:
                        os.kill(server.engine_pid(), signal.SIGKILL)
                        killed = time.monotonic()
                    if line.strip():
                        lines.append(line.strip())
            return lines[-1], time.monotonic() - killed

        last, seconds = asyncio.run(run())
        assert b'"error"' in last and seconds < 1.0
        assert get(f"{server.url}/health")[0] == 503
        server.wait_ready()
        again = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0).completions.create(
            model="toy", prompt="once", max_tokens=5, extra_body={"ignore_eos": True}
        )
        assert again.usage is not None and again.usage.completion_tokens == 5
        assert server.metric("engine_restarts_total") == 1
