"""An engine process without an engine: it plays a recorded answer to every request, all of them in step.

`python -m tokenspeed.bench.stub_engine FD LEVEL FORMAT`, in the place of `tokenspeed.engine.process`. Every running
request gets one token a step. TOKENSPEED_STUB_RATE is the number of steps a second; TOKENSPEED_STUB_TIMES a file to
which each answer adds a line when it is complete: the request's seed and when each token was sent, by the monotonic
clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import sys
import time
from dataclasses import dataclass, field
from itertools import cycle, islice

import msgspec
import uvloop

from tokenspeed.batch import Finish
from tokenspeed.bench.vocabulary import text
from tokenspeed.checkpoint.source import resolve
from tokenspeed.config import EngineConfig
from tokenspeed.engine.messages import (
    Abort,
    Accepted,
    ChoiceTokens,
    EngineStats,
    Heartbeat,
    Ready,
    Shutdown,
    Start,
    Submit,
    ToEngine,
    Tokens,
)
from tokenspeed.engine.transport import Channel
from tokenspeed.request import SamplingParams
from tokenspeed.text.load import load_text

BEAT_SECONDS = 0.25
CALL = '<tool_call>\n{"name": "write_file", "arguments": {"path": "/tmp/notes", "content": "%s"}}\n</tool_call>'
PROSE_WORDS, CALL_WORDS = 300, 200


@dataclass
class Played:
    """An answer in progress."""

    id: int
    seed: int
    max_tokens: int
    times: list[float] = field(default_factory=list)


class StubEngine:
    """Plays `script`, over and over, to each request until its `max_tokens`."""

    def __init__(self, channel: Channel[ToEngine], script: list[int], rate: float) -> None:
        self._channel = channel
        self._script = script
        self._period = 1.0 / rate
        self._played: dict[int, Played] = {}
        self._sent = 0

    async def run(self) -> None:
        """Until `Shutdown`, or until the front end is gone."""
        tasks = [asyncio.create_task(self._play()), asyncio.create_task(self._beat())]
        try:
            with contextlib.suppress(EOFError):
                while not isinstance(message := await self._channel.receive(), Shutdown):
                    self._handle(message)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _handle(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            params = msgspec.msgpack.decode(message.params, type=SamplingParams)
            self._played[message.id] = Played(message.id, message.seed, params.max_tokens or 1)
            self._channel.send(Accepted(message.id))
        elif isinstance(message, Abort):
            self._played.pop(message.id, None)

    async def _play(self) -> None:
        due = time.monotonic()
        while True:
            due = max(due + self._period, time.monotonic() - 1.0)
            await asyncio.sleep(due - time.monotonic())
            if self._played:
                self._step(time.monotonic())

    def _step(self, now: float) -> None:
        gained: list[ChoiceTokens] = []
        for played in list(self._played.values()):
            token_id = self._script[len(played.times) % len(self._script)]
            played.times.append(now)
            over = len(played.times) == played.max_tokens
            gained.append(ChoiceTokens(played.id, [token_id], Finish.LENGTH if over else 0))
            if over:
                self._over(played)
        self._sent += len(gained)
        self._channel.send(Tokens(gained, self._stats()))

    def _over(self, played: Played) -> None:
        del self._played[played.id]
        if path := os.environ.get("TOKENSPEED_STUB_TIMES"):
            with open(path, "a", encoding="ascii") as file:
                file.write(" ".join([str(played.seed), *map(repr, played.times)]) + "\n")

    def _stats(self) -> EngineStats:
        return EngineStats(running=len(self._played), blocks_total=1, generation_tokens=self._sent)

    async def _beat(self) -> None:
        while True:
            self._channel.send(Heartbeat(self._stats()))
            await asyncio.sleep(BEAT_SECONDS)


def _script(config: EngineConfig) -> list[int]:
    """Prose with characters of several bytes, then a call of a tool with a long argument."""
    tokenizer = load_text(resolve(config.model, config.load_format)).tokenizer
    source = random.Random(1)
    answer = text(source, PROSE_WORDS) + CALL % text(source, CALL_WORDS)
    return list(islice(cycle(tokenizer.encode(answer, parse_special=True)), 4096))


async def serve(descriptor: int) -> None:
    """Serve one front end over the socket of that descriptor."""
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=descriptor))
    channel: Channel[ToEngine] = Channel(reader, writer, ToEngine)
    first = await channel.receive()
    if not isinstance(first, Start):
        raise ValueError(f"expected Start, got {type(first).__name__}")
    script = _script(first.config)
    channel.send(
        Ready(max_model_len=first.config.max_model_len or 1 << 20, num_blocks=1 << 20, block_size=64, summary="a stub")
    )
    await StubEngine(channel, script, float(os.environ["TOKENSPEED_STUB_RATE"])).run()
    await channel.flush()
    channel.close()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
