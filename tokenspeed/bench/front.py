"""What the front end costs: the real server before a stub engine that plays answers at a fixed rate.

A load generator, in this process, holds `streams` streamed chats open, which get `rate` tokens a second each; the
answers have characters of several bytes and tool calls, over a vocabulary of 100,000 tokens. That is done twice: alone,
and while every 100 ms a chat of 1 MB arrives whose history the server has seen before.

Printed are the processor time of the front-end process for each streamed token, how much of it the kernel took, how
much of the engine's rate was delivered, and how much later than from the engine a token arrived here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import uvloop

from tokenspeed.bench.serve import percentile
from tokenspeed.bench.vocabulary import text, write_checkpoint

CONTEXT = 1 << 20
BODY_SECONDS = 0.1
OPENING_SECONDS = 1.0
PROBED = 8
"""One stream of so many asks for token ids: only these tell how late each token is."""
TOKEN_IDS = re.compile(rb'"token_ids":\[([\d,]+)\]')
TOOL = {
    "type": "function",
    "function": {
        "name": "write_file",
        "parameters": {"type": "object", "properties": {"path": {"type": "string"}, "content": {"type": "string"}}},
    },
}


@dataclass
class Run:
    """One measurement. Seconds, except for the number of tokens and of large bodies. `kernel` is a part of `cpu`."""

    name: str
    tokens: int
    cpu: float
    kernel: float
    engine: float
    delivered: float
    delays: list[float]
    bodies: int

    def row(self) -> str:
        """The figures as a line of the table."""
        delays = sorted(self.delays)
        return (
            f"{self.name:<20}{self.cpu / self.tokens * 1e6:>12.1f}{self.kernel / self.tokens * 1e6:>10.1f}"
            f"{self.engine / self.delivered * 100:>12.1f} %"
            f"{percentile(delays, 50) * 1e3:>12.2f}{percentile(delays, 99) * 1e3:>10.2f}"
            f"{self.cpu / self.delivered * 100:>10.0f} %{self.bodies:>10d}"
        )


HEAD = (
    f"{'':<20}{'CPU µs/token':>12}{'of kernel':>10}{'delivered':>14}"
    f"{'p50 ms':>12}{'p99 ms':>10}{'CPU':>12}{'bodies':>10}"
)


@dataclass(eq=False)
class Listening(asyncio.Protocol):
    """One streamed chat: reads as fast as it comes and keeps little of it."""

    request: bytes
    done: asyncio.Future[None]
    probed: bool
    arrived: list[float] = field(default_factory=list)
    _rest: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by inheritance
        self._transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if self.probed:
            *events, self._rest = (self._rest + data).split(b"\n\n")
            for event in events:
                found = TOKEN_IDS.search(event)
                if found is not None:
                    self.arrived += [now] * (found[1].count(b",") + 1)
        if b"data: [DONE]" in data:
            self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(ConnectionError("the server closed a stream before its end"))

    def _finish(self, error: Exception | None) -> None:
        if not self.done.done():
            if error is None:
                self.done.set_result(None)
                self._transport.close()
            else:
                self.done.set_exception(error)


def _post(body: dict[str, Any]) -> bytes:
    data = msgspec.json.encode(body)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(data)}\r\n\r\n".encode() + data


def _chat(number: int, tokens: int, probed: bool) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"This is stream {number}."}]
    asked = {"model": "stub", "messages": messages, "tools": [TOOL], "max_tokens": tokens, "seed": number}
    return {**asked, "stream": True, "return_token_ids": probed}


@contextmanager
def stub_server(vocabulary: int, rate: float, door: str = "http") -> Iterator[tuple[int, int, Path]]:
    """Port and process id of a server, and the file in which the stub engine writes when it sent each token."""
    with tempfile.TemporaryDirectory(prefix="tokenspeed-bench-") as name:
        folder, times = Path(name), Path(name) / "times"
        write_checkpoint(folder, vocabulary, CONTEXT)
        environment = {**os.environ, "TOKENSPEED_STUB_RATE": str(rate), "TOKENSPEED_STUB_TIMES": str(times)}
        command = [sys.executable, "-m", "tokenspeed.bench.stub_server", name, door]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, env=environment, text=True, **pipes) as server:  # type: ignore[call-overload]
            try:
                port = int(server.stdout.readline())
                yield port, server.pid, times
            finally:
                server.stdin.close()


class Bodies:
    """Large chats, one after the other: a history that stays, a last message that changes, one token of an answer."""

    def __init__(self, session: aiohttp.ClientSession, port: int) -> None:
        source = random.Random(2)
        self._history = [{"role": "user", "content": text(source, 1800)} for _ in range(100)]
        self._session = session
        self._url = f"http://127.0.0.1:{port}/v1/chat/completions"
        self.answered = 0

    async def ask(self) -> None:
        """One of them."""
        messages = [*self._history, {"role": "user", "content": f"This is body {self.answered}."}]
        data = msgspec.json.encode({"model": "stub", "messages": messages, "max_tokens": 1, "seed": -1 - self.answered})
        async with self._session.post(self._url, data=data, headers={"Content-Type": "application/json"}) as response:
            if response.status != 200:
                raise RuntimeError(f"a large body was answered {response.status}: {await response.text()}")
        self.answered += 1

    async def run(self) -> None:
        """One every `BODY_SECONDS`, or as often as they are answered, until cancelled."""
        while True:
            began = time.monotonic()
            await self.ask()
            await asyncio.sleep(max(0.0, began + BODY_SECONDS - time.monotonic()))


async def measured(
    name: str, server: tuple[int, int, Path], streams: int, tokens: int, bodies: Bodies | None
) -> Run:
    """Play to all streams at once until they end. The time in which they are opened is not counted."""
    port, process, times = server
    times.write_text("")
    before = 0 if bodies is None else bodies.answered
    loop = asyncio.get_running_loop()
    listening: list[Listening] = []
    for number in range(streams):
        probed = number % PROBED == 0
        one = Listening(_post(_chat(number, tokens, probed)), loop.create_future(), probed)
        await loop.create_connection(lambda one=one: one, "127.0.0.1", port)  # type: ignore[misc]
        listening.append(one)
    asking = None if bodies is None else asyncio.create_task(bodies.run())
    await asyncio.sleep(OPENING_SECONDS)
    before_cpu, before_kernel = processor_seconds(process)
    began = time.monotonic()
    await asyncio.gather(*(one.done for one in listening))
    cpu, kernel = processor_seconds(process)
    ended = time.monotonic()
    if asking is not None:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    sent = sent_times(times)
    departed = [at for number in range(streams) for at in sent[number] if at > began]
    delays = [
        arrived - at
        for number in range(0, streams, PROBED)
        for arrived, at in zip(listening[number].arrived, sent[number], strict=True)
        if at > began
    ]
    count = 0 if bodies is None else bodies.answered - before
    spent, of_it = cpu - before_cpu, kernel - before_kernel
    return Run(name, len(departed), spent, of_it, max(departed) - began, ended - began, delays, count)


def sent_times(times: Path) -> dict[int, list[float]]:
    """When the stub engine sent each token, by the seeds of the requests."""
    lines = [line.split() for line in times.read_text().splitlines()]
    return {int(seed): [float(part) for part in parts] for seed, *parts in lines}


def processor_seconds(process: int) -> tuple[float, float]:
    """Seconds of processor time that a process has used, and how much of it in the kernel, on Linux."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    tick = os.sysconf("SC_CLK_TCK")
    return (int(user) + int(system)) / tick, int(system) / tick


async def run(arguments: argparse.Namespace) -> list[Run]:
    """Both measurements."""
    streams, tokens = arguments.streams, int(arguments.rate * (arguments.seconds + OPENING_SECONDS))
    with stub_server(arguments.vocabulary, arguments.rate) as server:
        async with aiohttp.ClientSession() as session:
            bodies = Bodies(session, server[0])
            await bodies.ask()
            return [
                await measured("streams alone", server, streams, tokens, None),
                await measured("and 1 MB bodies", server, streams, tokens, bodies),
            ]


def _positive(value: str) -> float:
    if not 0 < float(value) < 1e6:
        raise ValueError(value)
    return float(value)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of this program."""
    parser.add_argument("--streams", type=int, default=64, help="streams at once (default: %(default)s)")
    parser.add_argument("--rate", type=_positive, default=200.0, help="tokens a second of each (default: %(default)g)")
    parser.add_argument("--seconds", type=_positive, default=8.0, help="of each measurement (default: %(default)g)")
    parser.add_argument("--vocabulary", type=int, default=100_000, help="tokens (default: %(default)s)")


def sensible(arguments: argparse.Namespace) -> bool:
    """Whether the flags make sense; says so where not."""
    if arguments.streams < 1 or arguments.vocabulary < 1000:
        print("bench: --streams must be at least 1, --vocabulary at least 1000", file=sys.stderr)
        return False
    return True


def main(arguments: argparse.Namespace) -> int:
    """Run and print; 2 when the flags make no sense."""
    if not sensible(arguments):
        return 2
    runs = uvloop.run(run(arguments))
    print("\n".join([HEAD, *(each.row() for each in runs)]))
    return 0
