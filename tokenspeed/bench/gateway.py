"""What the gRPC door costs: the real server before a stub engine that plays answers at a fixed rate.

A load generator, in this process, holds `streams` calls open, which get `rate` tokens a second each, over a vocabulary
of 100,000 tokens. That is done twice: as the server runs, where the tokens of a stream that are not sent yet share a
chunk, and with a chunk for each token.

Printed are the processor time of the front-end process for each token, how much of it the kernel took, how much of the
engine's rate was delivered, how much later than from the engine a token arrived here, and the tokens in a chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from pathlib import Path

import grpc
import uvloop
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as stubs

from tokenspeed.bench.front import (
    HEAD,
    OPENING_SECONDS,
    PROBED,
    Run,
    processor_seconds,
    sensible,
    sent_times,
    stub_server,
)

PROMPT = list(range(100, 356))


async def _listen(stub: stubs.TokenSpeedSchedulerStub, number: int, tokens: int) -> tuple[int, list[float]]:
    """Read one answer; the number of its chunks, and when each token arrived."""
    asked = pb.GenerateRequest(
        request_id=f"stream-{number}",
        tokenized=pb.TokenizedInput(input_ids=PROMPT),
        sampling_params=pb.SamplingParams(max_new_tokens=tokens, sampling_seed=number),
        stream=True,
    )
    chunks, arrived = 0, []
    async for message in stub.Generate(asked):
        if message.HasField("chunk"):
            chunks += 1
            arrived += [time.monotonic()] * len(message.chunk.token_ids)
    return chunks, arrived


async def measured(name: str, server: tuple[int, int, Path], streams: int, tokens: int) -> tuple[Run, float]:
    """Play to all streams at once until they end, and the tokens in a chunk. Opening them is not counted."""
    port, process, times = server
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = stubs.TokenSpeedSchedulerStub(channel)
        listening = [asyncio.create_task(_listen(stub, number, tokens)) for number in range(streams)]
        await asyncio.sleep(OPENING_SECONDS)
        before_cpu, before_kernel = processor_seconds(process)
        began = time.monotonic()
        heard = await asyncio.gather(*listening)
        cpu, kernel = processor_seconds(process)
        ended = time.monotonic()
    sent = sent_times(times)
    departed = [at for number in range(streams) for at in sent[number] if at > began]
    delays = [
        arrived - at
        for number in range(0, streams, PROBED)
        for arrived, at in zip(heard[number][1], sent[number], strict=True)
        if at > began
    ]
    shared = streams * tokens / sum(chunks for chunks, _ in heard)
    run = Run(
        name, len(departed), cpu - before_cpu, kernel - before_kernel, max(departed) - began, ended - began, delays, 0
    )
    return run, shared


async def run(arguments: argparse.Namespace) -> list[tuple[Run, float]]:
    """Both measurements."""
    tokens = int(arguments.rate * (arguments.seconds + OPENING_SECONDS))
    found = []
    for name, door in (("shared chunks", "grpc"), ("a chunk a token", "grpc-each")):
        with stub_server(arguments.vocabulary, arguments.rate, door) as server:
            found.append(await measured(name, server, arguments.streams, tokens))
    return found


def main(arguments: argparse.Namespace) -> int:
    """Run and print; 2 when the flags make no sense or the server does not start."""
    if not sensible(arguments):
        return 2
    try:
        found = uvloop.run(run(arguments))
    except (ValueError, RuntimeError) as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 2
    print(f"{HEAD}{'tokens/chunk':>14}")
    for one, shared in found:
        print(f"{one.row()}{shared:>14.2f}")
    return 0
