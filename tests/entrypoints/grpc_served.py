"""The real gRPC server around an `AsyncEngine` whose engine does what a test says, on one event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import msgspec
import uvloop
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as stubs

from tokenspeed.batch import Finish
from tokenspeed.bench.vocabulary import write_checkpoint
from tokenspeed.config import EngineConfig
from tokenspeed.engine.async_engine import AsyncEngine
from tokenspeed.engine.link import Receive
from tokenspeed.engine.messages import (
    Abort,
    Accepted,
    ChoiceTokens,
    DropCached,
    Dropped,
    EngineStats,
    FinishAt,
    Ready,
    Refused,
    Submit,
    ToEngine,
    Tokens,
)
from tokenspeed.entrypoints.auth import Keys
from tokenspeed.entrypoints.grpc.pace import pause_beside
from tokenspeed.entrypoints.grpc.server import GrpcServer
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.entrypoints.metrics import Metrics
from tokenspeed.request import SamplingParams

EOS = 2997
"""The end of a turn in the checkpoint that `write_model` makes."""


def write_model(folder: Path) -> None:
    """A checkpoint without weights, with 3,000 tokens and sampling defaults of its own."""
    write_checkpoint(folder, 3000, 8192)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": EOS}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, "temperature": 0.5, "top_k": 20}))


@dataclass
class Link:
    """An engine by hand: what was submitted is admitted, and gains what a test gives it, or all of `script`."""

    script: list[int] | None = None
    refusal: Refused | None = None
    loads: bool = True
    stats: EngineStats = field(default_factory=EngineStats)
    submitted: list[Submit] = field(default_factory=list)
    aborted: list[int] = field(default_factory=list)
    finished: list[tuple[int, int]] = field(default_factory=list)
    playing: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    drops: int = 0

    async def start(self, config: EngineConfig, receive: Receive) -> None:
        self.receive = receive
        self._news = asyncio.Event()
        if self.loads:
            asyncio.get_running_loop().call_soon(self.ready)

    def ready(self) -> None:
        self.receive(Ready(max_model_len=8192, num_blocks=1000, block_size=64, summary="by hand"))

    def send(self, message: ToEngine) -> None:
        match message:
            case Submit(id=id):
                self.submitted.append(message)
                if self.refusal is not None:
                    self._later(msgspec.structs.replace(self.refusal, id=id))
                else:
                    self._later(Accepted(id))
                    if self.script is not None:
                        self.playing[id] = asyncio.create_task(self._play(id, self.script))
            case Abort(id=id):
                self.aborted.append(id)
                self._end(id)
            case FinishAt(id, num_tokens):
                self.finished.append((id, num_tokens))
                self._end(id)
            case DropCached(id=id):
                self.drops += 1
                self._later(Dropped(id, num_blocks=3, num_held=0))
        self._news.set()

    def _end(self, id: int) -> None:
        if id in self.playing:
            self.playing.pop(id).cancel()

    def _later(self, message: Any) -> None:
        asyncio.get_running_loop().call_soon(self.receive, message)

    async def stop(self) -> None:
        for task in self.playing.values():
            task.cancel()

    async def _play(self, id: int, script: Sequence[int]) -> None:
        for at, token_id in enumerate(script):
            await asyncio.sleep(0)
            self.give(id, token_id, finish=Finish.STOP if at == len(script) - 1 else 0)

    def give(self, id: int, *token_ids: int, finish: int = 0, **fields: Any) -> None:
        """A choice has gained these tokens."""
        self.receive(Tokens([ChoiceTokens(id, list(token_ids), finish, **fields)], self.stats))

    async def until(self, told: Callable[[Link], object]) -> None:
        """Wait until the engine was told what the test waits for."""
        async with asyncio.timeout(10):
            while not told(self):
                self._news.clear()
                await self._news.wait()

    async def submits(self, count: int) -> list[Submit]:
        """All that was submitted, once there are so many."""
        await self.until(lambda link: len(link.submitted) >= count)
        return self.submitted

    def params(self, at: int = -1) -> SamplingParams:
        """Those of a submitted choice."""
        return msgspec.msgpack.decode(self.submitted[at].params, type=SamplingParams)


@dataclass
class Served:
    """A running server with a client. `generate` is a call of `Generate`."""

    engine: AsyncEngine
    server: GrpcServer
    link: Link
    metrics: Metrics
    channel: grpc.aio.Channel
    stub: Any

    def generate(self, id: str = "r", ids: Sequence[int] = (1, 2, 3), *, timeout: float = 20.0, **fields: Any) -> Any:
        sampling = fields.pop("sampling", {})
        request = pb.GenerateRequest(
            request_id=id,
            tokenized=pb.TokenizedInput(input_ids=ids),
            sampling_params=pb.SamplingParams(**{"temperature": 0.0, **sampling}),
            **{"stream": True, **fields},
        )
        return self.stub.Generate(request, timeout=timeout)


def serving(
    checkpoint: Path,
    work: Callable[[Served], Awaitable[None]],
    *,
    link: Link | None = None,
    limits: Limits | None = None,
    keys: Keys | None = None,
    pause: float | None = None,
    tls: tuple[Path, Path] | None = None,
    **config: Any,
) -> None:
    """Run `work` beside a server; with a `pause` tokens gather for that long, whoever else streams.

    `tls` are the files of a private key and of its certificate.
    """

    async def serve() -> None:
        made = link or Link()
        engine = AsyncEngine(EngineConfig(model=str(checkpoint), load_format="dummy", **config), link=made)
        metrics = Metrics(engine)
        server = GrpcServer(
            engine,
            host="127.0.0.1",
            port=0,
            keys=keys or Keys((), ()),
            limits=limits or Limits(heartbeat_seconds=60.0),
            metrics=metrics,
            served_names=("m",),
            tls=None if tls is None else (str(tls[0]), str(tls[1])),
            pause_beside=pause_beside if pause is None else lambda _: pause,
        )
        if made.loads:
            await engine.start()
        await server.start()
        address = f"127.0.0.1:{server.port}"
        if tls is None:
            opened = grpc.aio.insecure_channel(address)
        else:
            opened = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(tls[1].read_bytes()))
        try:
            async with opened as channel:
                await work(Served(engine, server, made, metrics, channel, stubs.TokenSpeedSchedulerStub(channel)))
        finally:
            server.drain()
            await engine.stop(0.0)
            await server.close()

    uvloop.run(asyncio.wait_for(serve(), 60))


async def read(call: Any) -> list[pb.GenerateResponse]:
    """All messages of an answer."""
    return [message async for message in call]


async def one(call: Any) -> pb.GenerateResponse:
    """The next message of an answer."""
    return await anext(aiter(call))


async def refused(call: Any) -> grpc.aio.AioRpcError:
    """How a call ends that is refused."""
    try:
        await (read(call) if isinstance(call, AsyncIterable) else call)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("it was not refused")
