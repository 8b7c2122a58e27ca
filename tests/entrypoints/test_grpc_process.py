"""The programs that serve gRPC, as processes around the real engine: ports, signals, what is printed."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as stubs

from tests.entrypoints.test_server_process import ask, free_port, process, wait_status
from tests.toy import toy_llama

GRPC, API = "tokenspeed.entrypoints.grpc", "tokenspeed.entrypoints.api"
BLOCK = 16


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("llama")
    toy_llama(folder)
    return ("--model", str(folder), "--block-size", str(BLOCK), "--num-threads", "1", "--dtype", "float32")


def generate(id: str, count: int, **fields: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(temperature=0.0, max_new_tokens=count, ignore_eos=True)
    ids = range(5, 5 + 3 * BLOCK)
    return pb.GenerateRequest(request_id=id, tokenized={"input_ids": ids}, sampling_params=sampling, **fields)


def talking(port: int, work: Callable[[Any], Awaitable[None]]) -> None:
    """Do `work` with a stub, once the server is healthy."""

    async def talk() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = stubs.TokenSpeedSchedulerStub(channel)
            while not (await stub.HealthCheck(pb.HealthCheckRequest(), wait_for_ready=True)).healthy:
                await asyncio.sleep(0.05)
            await work(stub)

    asyncio.run(asyncio.wait_for(talk(), 60))


async def ids_of(call: Any) -> list[int]:
    found: list[int] = []
    async for message in call:
        found += [*message.chunk.token_ids, *message.complete.output_ids]
    return found


def test_the_program_serves_prints_what_a_gateway_needs_and_ends_with_0(flags: tuple[str, ...]) -> None:
    port = free_port()

    async def work(stub: Any) -> None:
        whole = await ids_of(stub.Generate(generate("whole", 20)))
        batches = stub.SubscribeKvEvents(common.SubscribeKvEventsRequest())
        stored: list[int] = []
        async with asyncio.timeout(20):
            async for batch in batches:
                for event in batch.events:
                    stored += [id for block in event.stored.blocks for id in block.token_ids]
                if len(stored) >= 4 * BLOCK:
                    break
        batches.cancel()
        assert stored == [*range(5, 5 + 3 * BLOCK), *whole[: len(stored) - 3 * BLOCK]]
        streamed = stub.Generate(generate("streamed", 20, stream=True))
        assert await ids_of(streamed) == whole and len(whole) == 20
        complete = [message async for message in stub.Generate(generate("again", 1))][-1].complete
        assert complete.cached_tokens >= 2 * BLOCK and complete.prompt_tokens == 3 * BLOCK
        assert (await stub.FlushCache(common.FlushCacheRequest(timeout_s=5))).success
        complete = [message async for message in stub.Generate(generate("new", 1))][-1].complete
        assert complete.cached_tokens == 0
        lasting = stub.Generate(generate("lasting", 400, stream=True))
        first = await anext(aiter(lasting))
        child.send_signal(signal.SIGTERM)
        assert len([*first.chunk.token_ids, *await ids_of(lasting)]) == 400, "it ends before the server does"

    with process("--port", str(port), *flags, module=GRPC) as child:
        talking(port, work)
        out, err = child.communicate(timeout=20)
    assert child.returncode == 0 and "Traceback" not in err
    announced, command = out.splitlines()
    assert f"grpc://127.0.0.1:{port}" in announced
    assert f"--worker-urls grpc://127.0.0.1:{port}" in command and command.startswith("smg launch")


def test_one_process_may_speak_both(flags: tuple[str, ...]) -> None:
    http_port, port = free_port(), free_port()
    both = ("--port", str(http_port), "--grpc-port", str(port), "--served-model-name", "m")

    async def work(stub: Any) -> None:
        found = await ids_of(stub.Generate(generate("r", 8)))
        body = {"model": "m", "prompt": list(range(5, 5 + 3 * BLOCK)), "max_tokens": 8, "temperature": 0}
        more = {"ignore_eos": True, "return_token_ids": True}
        status, _, text = await asyncio.to_thread(ask, http_port, "POST", "/v1/completions", body | more)
        assert status == 200 and str(found).replace(" ", "") in text
        _, _, metrics = await asyncio.to_thread(ask, http_port, "GET", "/metrics")
        assert 'tokenspeed:request_success_total{finished_reason="length"} 2.0' in metrics

    with process(*both, *flags, module=API) as child:
        wait_status(http_port, "/ready", 200, 60.0)
        talking(port, work)
        child.send_signal(signal.SIGTERM)
        out, _ = child.communicate(timeout=20)
    assert child.returncode == 0
    assert f"http://127.0.0.1:{http_port}" in out and f"grpc://127.0.0.1:{port}" in out


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("module", [GRPC, API])
def test_a_taken_port_is_one_line_and_status_2(module: str, taken: int) -> None:
    flags = ("--port", str(taken)) if module == GRPC else ("--port", "0", "--grpc-port", str(taken))
    with process(*flags, module=module) as child:
        out, err = child.communicate(timeout=30)
    assert (child.returncode, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("tokenspeed: ")]
    assert len(lines) == 1 and f"127.0.0.1:{taken}" in lines[0]
    assert "Traceback" not in err
