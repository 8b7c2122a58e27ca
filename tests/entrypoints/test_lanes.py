"""What goes straight from the engine's frame to the socket is, byte for byte, what the long way would have sent."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop

from tokenspeed.batch import Finish
from tokenspeed.bench.vocabulary import write_checkpoint
from tokenspeed.config import EngineConfig
from tokenspeed.engine import lane, running
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.engine.link import Receive
from tokenspeed.engine.messages import (
    Abort,
    Accepted,
    ChoiceTokens,
    EngineStats,
    FinishAt,
    Ready,
    Submit,
    ToEngine,
    Tokens,
)
from tokenspeed.entrypoints.auth import Keys
from tokenspeed.entrypoints.door import Door
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.entrypoints.listen import bind
from tokenspeed.entrypoints.server import Server

ARGUMENTS = '{"path": "/tmp/a b", "content": "def f(x):\\n\\treturn \\"\\u00e9\\" + x[1:] # öäü 日本 👋", "n": [1, 2]}'
CALL = f'<tool_call>\n{{"name": "write_file", "arguments": {ARGUMENTS}}}\n</tool_call>'
PROSE = 'Some prose, with a < b and "quotes";\nlines\n\nand 日本語 or 👋🏽 – until it STOPs. Then more, and more words.'
THOUGHT = f"<think>\nLet me see: {PROSE}\n</think>\n\n"
TOOL = {"name": "write_file", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}}
HI = [{"role": "user", "content": "Hi"}]
CHAT: dict[str, Any] = {"messages": HI, "tools": [{"type": "function", "function": TOOL}]}
USAGE = {"stream_options": {"include_usage": True}}
MESSAGE: dict[str, Any] = {
    "messages": HI,
    "max_tokens": 2000,
    "tools": [{"name": TOOL["name"], "input_schema": TOOL["parameters"]}],
}
RESPONSE: dict[str, Any] = {"input": "Hi", "tools": [{"type": "function", **TOOL}]}

REQUESTS = {
    "a chat": ("/v1/chat/completions", {"messages": HI}),
    "with tools and usage": ("/v1/chat/completions", CHAT | USAGE),
    "two choices": ("/v1/chat/completions", CHAT | {"n": 2}),
    "token ids": ("/v1/chat/completions", CHAT | {"return_token_ids": True}),
    "log-probabilities": ("/v1/chat/completions", CHAT | {"logprobs": True}),
    "a stop string": ("/v1/chat/completions", CHAT | {"stop": ["STOP", "more, and"]}),
    "special tokens shown": ("/v1/chat/completions", CHAT | {"skip_special_tokens": False}),
    "one call only": ("/v1/chat/completions", CHAT | {"parallel_tool_calls": False}),
    "a completion": ("/v1/completions", {"prompt": "Hi"}),
    "completions of two prompts": ("/v1/completions", {"prompt": ["Hi", "Ho"], "echo": True} | USAGE),
    "a message": ("/v1/messages", MESSAGE),
    "a response": ("/v1/responses", RESPONSE),
    "a whole text every time": ("/generate", {"text": "Hi"}),
}


@dataclass
class ScriptedLink:
    """An engine that answers every choice with the same tokens, one to three a step."""

    script: list[int] = field(default_factory=list)
    seed: int = 0
    pause: float = 0.0
    """Seconds in the middle of an answer."""

    async def start(self, config: EngineConfig, receive: Receive) -> None:
        self._receive = receive
        self._playing: dict[int, asyncio.Task[None]] = {}
        ready = Ready(max_model_len=8192, num_blocks=1000, block_size=64, summary="scripted")
        asyncio.get_running_loop().call_soon(receive, ready)

    def send(self, message: ToEngine) -> None:
        match message:
            case Submit(id=id):
                asyncio.get_running_loop().call_soon(self._receive, Accepted(id))
                self._playing[id] = asyncio.create_task(self._play(id))
            case FinishAt(id=id) | Abort(id=id):
                self._playing.pop(id).cancel()

    async def stop(self) -> None:
        for task in self._playing.values():
            task.cancel()

    async def _play(self, id: int) -> None:
        source = random.Random(self.seed)
        await asyncio.sleep(0.02)
        at = 0
        while at < len(self.script):
            ids = self.script[at : at + source.choice((1, 1, 1, 1, 2, 3))]
            at += len(ids)
            over = at == len(self.script)
            self._receive(Tokens([ChoiceTokens(id, ids, Finish.STOP if over else 0)], EngineStats()))
            half = at - len(ids) < len(self.script) // 2 <= at
            await asyncio.sleep(self.pause if half else 0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lanes")
    write_checkpoint(folder, 3000, 8192)
    return folder


Ask = Callable[[str, dict[str, Any]], Coroutine[Any, Any, str]]


def serving(
    checkpoint: Path,
    answer: str,
    work: Callable[[Ask, Door, int], Awaitable[None]],
    limits: Limits | None = None,
    pause: float = 0.0,
) -> None:
    """Run `work` beside a server whose engine gives `answer`, with a pause in the middle."""

    async def serve() -> None:
        link = ScriptedLink(pause=pause)
        engine = AsyncEngine(EngineConfig(model=str(checkpoint), load_format="dummy"), link=link)
        await engine.start()
        link.script = engine.tokenizer.encode(answer, parse_special=True)
        door = Door(engine, keys=Keys((), ()), limits=limits or Limits(), served_names=("m",), reasoning_parser="qwen3")
        listener = bind("127.0.0.1", 0)
        server = Server(door, listener)
        await server.start()
        port = listener.getsockname()[1]
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:

            async def ask(route: str, body: dict[str, Any]) -> str:
                link.seed += 1
                async with session.post(route, json={"model": "m", "stream": True, "seed": 1, **body}) as response:
                    assert response.status == 200, await response.text()
                    return await response.text()

            await work(ask, door, port)
        await server.stop(0.0)

    uvloop.run(asyncio.wait_for(serve(), 60))


@contextmanager
def carried(monkeypatch: pytest.MonkeyPatch, *, lanes: bool = True) -> Iterator[list[int]]:
    """How many messages of a choice went straight, of how many, with how many tokens; none without `lanes`."""
    counts = [0, 0, 0]

    def carry(gained: list[ChoiceTokens], *rest: Any) -> list[ChoiceTokens]:
        left = lane.carry(gained, *rest) if lanes else gained
        counts[0] += len(gained) - len(left)
        counts[1] += len(gained)
        counts[2] += sum(len(item.token_ids) for item in gained)
        return left

    with monkeypatch.context() as patch:
        patch.setattr(running, "carry", carry)
        yield counts


def same(text: str) -> str:
    """A stream without what is drawn anew in every answer, ids and times, and choice by choice."""
    text = re.sub(r'"(id|item_id|call_id)":"[^"]*"', r'"\1":""', text)
    text = re.sub(r'"(created|created_at|completed_at|e2e_latency)":[\d.]+', r'"\1":0', text)

    def choice(event: str) -> str:
        found = re.search(r'"choices":\[\{"index":(\d+)', event)
        return "" if found is None else found[1]

    return "\n\n".join(sorted(text.split("\n\n"), key=choice))


@pytest.mark.parametrize("name", REQUESTS)
def test_every_stream_is_the_same_with_and_without_lanes(
    name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    route, body = REQUESTS[name]
    straight: list[str] = []
    long: list[str] = []

    async def work(ask: Ask, door: Door, port: int) -> None:
        with carried(monkeypatch) as counts:
            straight.extend([await ask(route, body) for _ in range(3)])
        some, all, _ = counts
        if name in ("log-probabilities", "one call only", "a whole text every time"):
            assert some == 0
        else:
            assert some > 0.4 * all, counts

    async def work_long(ask: Ask, door: Door, port: int) -> None:
        with carried(monkeypatch, lanes=False) as counts:
            long.extend([await ask(route, body) for _ in range(3)])
        assert counts[0] == 0

    answer = THOUGHT + PROSE + CALL + PROSE if "chat" in route or "messages" in route or "responses" in route else PROSE
    serving(checkpoint, answer + "<|im_end|>", work)
    serving(checkpoint, answer + "<|im_end|>", work_long)
    for one, other in zip(straight, long, strict=True):
        assert same(one) == same(other)
        assert len(one) > 2000


def test_calls_that_went_straight_are_noted_as_the_model_wrote_them(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(ask: Ask, door: Door, port: int) -> None:
        with carried(monkeypatch) as counts:
            events = [json.loads(line[6:]) for line in (await ask("/v1/chat/completions", CHAT)).split("\n\n")[:-2]]
        assert counts[0] > 20
        calls = [call for event in events for call in event["choices"][0]["delta"].get("tool_calls", ())]
        written = "".join(call["function"]["arguments"] for call in calls)
        assert written == ARGUMENTS
        call = {"id": calls[0]["id"], "function": {"name": "write_file", "arguments": json.loads(written)}}
        (message,) = door.written_calls.restored([{"role": "assistant", "tool_calls": [call]}], "")
        restored = message["tool_calls"][0]["function"]["arguments"]
        assert restored.written_as == ARGUMENTS

    serving(checkpoint, CALL + "<|im_end|>", work)


def test_tokens_that_went_straight_are_counted_where_all_are(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(ask: Ask, door: Door, port: int) -> None:
        with carried(monkeypatch) as counts:
            text = await ask("/v1/chat/completions", CHAT | USAGE)
        assert counts[0] > 20
        usage = json.loads(text.split("data: ")[-2])["usage"]
        total = len(door.engine.tokenizer.encode(THOUGHT + PROSE + "<|im_end|>", parse_special=True))
        thought = len(door.engine.tokenizer.encode(THOUGHT.rstrip("\n")))
        assert usage["completion_tokens"] == total
        assert abs(usage["completion_tokens_details"]["reasoning_tokens"] - thought) <= 4
        shown = door.metrics.text().decode()
        gaps = re.search(r"inter_token_latency_seconds_count (\S+)", shown)
        assert gaps is not None and total - 3 <= float(gaps[1]) < total

    serving(checkpoint, THOUGHT + PROSE + "<|im_end|>", work)


def test_a_client_that_reads_slowly_gets_all_in_order(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(f"word {number}," for number in range(400))

    async def work(ask: Ask, door: Door, port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        body = json.dumps({"model": "m", "stream": True, "messages": HI}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        read = [b""]
        with carried(monkeypatch) as counts:
            await asyncio.sleep(0.3)
            while b"[DONE]" not in b"".join(read[-2:]):
                read.append(await reader.read(4096))
                assert read[-1], "closed before its end"
        writer.close()
        assert counts[0] > 100
        contents = re.findall(rb'"content":"((?:[^"\\]|\\.)*)"', b"".join(read))
        assert b"".join(contents).decode() == words

    serving(checkpoint, words + "<|im_end|>", work, Limits(write_buffer_bytes=2048))


def test_a_client_that_leaves_ends_its_own_stream_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(f"word {number}," for number in range(200))
    body = json.dumps({"model": "m", "stream": True, "messages": HI}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

    async def work(ask: Ask, door: Door, port: int) -> None:
        with carried(monkeypatch) as counts:
            staying = asyncio.create_task(ask("/v1/chat/completions", {"messages": HI}))
            for _ in range(3):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                await reader.readuntil(b'"content":"w')
                writer.close()
            text = await staying
            async with asyncio.timeout(10):
                while door.active:
                    await asyncio.sleep(0.01)
        assert counts[0] > 100
        assert "".join(re.findall(r'"content":"((?:[^"\\]|\\.)*)"', text)) == words
        assert len(set(re.findall(r'"id":"([^"]*)"', text))) == 1

    serving(checkpoint, words + "<|im_end|>", work)


def test_what_is_said_in_a_silence_knows_all_that_went_straight(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(ask: Ask, door: Door, port: int) -> None:
        with carried(monkeypatch) as counts:
            text = await ask("/v1/responses", {"input": "Hi"})
        assert counts[0] > 20
        events = [json.loads(line) for line in re.findall(r"^data: (.*)$", text, re.M)]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        kinds = [event["type"] for event in events]
        silent = [index for index, kind in enumerate(kinds) if kind == "response.in_progress"]
        assert len(silent) > 1 and "response.output_text.delta" in kinds[silent[0] : silent[1]]
        deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
        assert "".join(deltas) == PROSE == events[-1]["response"]["output"][0]["content"][0]["text"]

    serving(checkpoint, PROSE + "<|im_end|>", work, Limits(keepalive_seconds=0.1), pause=0.5)


def test_an_answer_that_is_aborted_counts_what_went_straight(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(ask: Ask, door: Door, port: int) -> None:
        with carried(monkeypatch) as counts:
            asking = asyncio.create_task(ask("/v1/chat/completions", {"messages": HI} | USAGE))
            while not counts[0] > 20:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            (id,) = door.active
            await door.abort(id)
            events = [json.loads(line) for line in re.findall(r"^data: ({.*)$", await asking, re.M)]
        assert events[-1]["usage"]["completion_tokens"] == counts[2]
        assert [event["choices"][0]["finish_reason"] for event in events[-2:-1]] == ["abort"]

    serving(checkpoint, PROSE + "<|im_end|>", work, pause=30.0)
