"""The real HTTP server around the fake engine, on an event loop of its own thread."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import uvloop

from tests.entrypoints.fake_engine import FakeEngine
from tokenspeed.entrypoints.auth import Keys
from tokenspeed.entrypoints.door import Door
from tokenspeed.entrypoints.flags import MetricsCompat, ReasoningField
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.entrypoints.listen import bind
from tokenspeed.entrypoints.server import Server
from tokenspeed.text.template import ChatTemplate


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    text: str

    def json(self) -> Any:
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """The error object of an answer in OpenAI's error shape."""
        body = self.json()
        assert list(body) == ["error"], body
        assert set(body["error"]) == {"message", "type", "param", "code"}, body
        assert body["error"]["message"], body
        return dict(body["error"])


class Served:
    """`engine` and `door` live on the server's loop: change them with `call`."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, engine: FakeEngine, door: Door, server: Server, port: int
    ) -> None:
        self.loop = loop
        self.engine = engine
        self.door = door
        self.server = server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def get(self, path: str, **headers: str) -> Reply:
        return self.send("GET", path, headers=headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """POST JSON, or bytes as they are; header names are written with underscores."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, data, {"Content-Type": "application/json", **headers})

    def send(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            named = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode())
        finally:
            connection.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(15)

    def call(self, work: Callable[[], Any]) -> Any:
        async def inner() -> Any:
            return work()

        return self.run(inner())

    def wait_until(self, condition: Callable[[], bool], seconds: float = 3.0) -> None:
        async def inner() -> None:
            async with asyncio.timeout(seconds):
                while not condition():
                    await asyncio.sleep(0.002)

        self.run(inner())

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)


@contextlib.contextmanager
def serving(
    *,
    limits: Limits | None = None,
    user_keys: tuple[str, ...] = (),
    admin_keys: tuple[str, ...] = (),
    served_names: tuple[str, ...] = (),
    allowed_origins: tuple[str, ...] = (),
    template: ChatTemplate | None = None,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    reasoning_field: ReasoningField = "reasoning_content",
    metrics_compat: MetricsCompat = "none",
    **facts: Any,
) -> Iterator[Served]:
    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    listener = bind("127.0.0.1", 0)

    async def start() -> tuple[FakeEngine, Door, Server]:
        engine = FakeEngine(**facts)
        if template is not None:
            engine.template = template
        door = Door(
            engine,  # type: ignore[arg-type]
            keys=Keys(user_keys, admin_keys),
            limits=limits or Limits(),
            served_names=served_names,
            allowed_origins=allowed_origins,
            tool_call_parser=tool_call_parser,
            reasoning_parser=reasoning_parser,
            reasoning_field=reasoning_field,
            metrics_compat=metrics_compat,
        )
        server = Server(door, listener)
        await server.start()
        return engine, door, server

    engine, door, server = asyncio.run_coroutine_threadsafe(start(), loop).result(15)
    served = Served(loop, engine, door, server, listener.getsockname()[1])
    try:
        yield served
    finally:
        if not server.stopped:
            served.run(server.stop(0.0))
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def chat(**fields: Any) -> dict[str, Any]:
    """A valid chat body, changed by `fields`; a field that is `...` is left out."""
    return _without({"model": "echo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, **fields})


def completion(**fields: Any) -> dict[str, Any]:
    """A valid completion body, changed by `fields`; a field that is `...` is left out."""
    return _without({"model": "echo", "prompt": "hello", "max_tokens": 8, **fields})


def _without(body: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not ...}


def events(text: str) -> list[Any]:
    """The data of server-sent events: parsed JSON, or the string [DONE]; comments as they are."""
    result: list[Any] = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            result.append(data if data == "[DONE]" else json.loads(data))
        elif block:
            result.append(block)
    return result
