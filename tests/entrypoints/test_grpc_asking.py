"""What a gateway and an administrator ask over gRPC besides tokens: health, facts, loads, files, the cache."""

from __future__ import annotations

import asyncio
import hashlib
import io
import subprocess
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tokenizers
from google.protobuf.json_format import MessageToDict
from smg_grpc_proto.generated import common_pb2 as common
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as stubs

from tests.entrypoints.grpc_served import EOS, Link, Served, read, refused, serving, write_model
from tokenspeed import __version__
from tokenspeed.batch import CACHE_RECORD, CacheChange, CacheEvents, Finish
from tokenspeed.engine import cache_watch
from tokenspeed.engine.messages import EngineStats, Failed, Heartbeat, Lost, PoolStats
from tokenspeed.entrypoints.auth import Keys
from tokenspeed.entrypoints.grpc import tokenizer_files
from tokenspeed.entrypoints.grpc.server import GrpcServer
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.errors import ConfigError

Code = grpc.StatusCode
BLOCK = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpc")
    write_model(folder)
    return folder


async def health(served: Served) -> tuple[bool, str]:
    answer = await served.stub.HealthCheck(pb.HealthCheckRequest())
    return answer.healthy, answer.message


# Health and keys ---------------------------------------------------------------------------------------


def test_health_follows_the_engine(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        assert await health(served) == (True, "")
        served.link.receive(Lost("killed"))
        assert await health(served) == (False, "The engine is restarting")
        served.link.ready()
        assert await health(served) == (True, "")
        served.server.drain()
        assert await health(served) == (False, "The server is shutting down")

    serving(checkpoint, work)


def test_an_engine_that_loads_is_dead_or_silent_is_not_healthy(checkpoint: Path) -> None:
    async def loading(served: Served) -> None:
        assert await health(served) == (False, "The engine is loading")
        for call in (
            served.generate(),
            served.stub.GetModelInfo(pb.GetModelInfoRequest()),
            served.stub.GetServerInfo(pb.GetServerInfoRequest()),
            served.stub.GetLoads(pb.GetLoadsRequest()),
            served.stub.GetTokenizer(common.GetTokenizerRequest()),
            served.stub.SubscribeKvEvents(common.SubscribeKvEventsRequest()),
            served.stub.FlushCache(common.FlushCacheRequest()),
        ):
            error = await refused(call)
            assert error.code() is Code.UNAVAILABLE and "loading" in str(error.details())
        assert (await served.stub.Abort(pb.AbortRequest(request_id="r"))).success

    async def dead(served: Served) -> None:
        served.link.receive(Failed("out of memory", config=False))
        assert await health(served) == (False, "The engine is dead")
        assert (await refused(served.generate())).code() is Code.UNAVAILABLE

    async def silent(served: Served) -> None:
        assert await health(served) == (False, "The engine does not answer")
        assert (await refused(served.generate())).code() is Code.UNAVAILABLE

    serving(checkpoint, loading, link=Link(loads=False))
    serving(checkpoint, dead)
    serving(checkpoint, silent, limits=Limits(heartbeat_seconds=0.0))


def test_whoever_has_a_key_may_ask_and_everybody_whether_it_is_well(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        ask = served.stub.GetModelInfo
        for metadata in ((), (("authorization", "Bearer other"),), (("authorization", "Basic mine"),)):
            error = await refused(ask(pb.GetModelInfoRequest(), metadata=metadata))
            assert error.code() is Code.UNAUTHENTICATED and "authorization" in str(error.details())
        for metadata in (
            (("authorization", "Bearer mine"), ("x-other-bin", b"\0\xff")),
            (("authorization", "bearer admin"),),
            (("x-api-key", "mine"),),
        ):
            assert (await ask(pb.GetModelInfoRequest(), metadata=metadata)).vocab_size == 3000
        assert (await refused(served.generate())).code() is Code.UNAUTHENTICATED
        assert not served.link.submitted
        assert await health(served) == (True, "")

    serving(checkpoint, work, keys=Keys(("mine",), ("admin",)))


def test_a_message_over_the_limit_is_refused_and_the_next_one_is_not(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        error = await refused(served.generate("long", [1] * 2000))
        assert error.code() is Code.RESOURCE_EXHAUSTED
        served.link.script = [100, EOS]
        assert (await read(served.generate("short", [1] * 500)))[-1].complete.finish_reason == "stop"

    serving(checkpoint, work, limits=Limits(max_message_bytes=1000, heartbeat_seconds=60.0))


def test_tls_is_spoken_with_the_given_certificate(checkpoint: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {key} -out {certificate}"
    subject = ["-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make.split(), *subject], check=True, capture_output=True)

    async def work(served: Served) -> None:
        served.link.script = [100, EOS]
        assert (await read(served.generate()))[-1].complete.finish_reason == "stop"
        async with grpc.aio.insecure_channel(f"127.0.0.1:{served.server.port}") as plain:
            stub = stubs.TokenSpeedSchedulerStub(plain)
            assert (await refused(stub.HealthCheck(pb.HealthCheckRequest()))).code() is Code.UNAVAILABLE

    serving(checkpoint, work, tls=(key, certificate))


def test_a_port_that_is_taken_is_told_and_a_server_that_never_started_closes(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        taken = served.server.port
        rest: dict[str, Any] = {"keys": Keys((), ()), "limits": Limits(), "metrics": served.metrics}
        for host, port in (("127.0.0.1", taken), ("192.0.2.1", 0)):
            with pytest.raises(ConfigError, match=f"{host}:{port}"):
                GrpcServer(served.engine, host=host, port=port, **rest)
        other = GrpcServer(served.engine, host="127.0.0.1", port=0, **rest)
        assert other.port not in (0, taken)
        await asyncio.wait_for(other.close(), 2)

    serving(checkpoint, work)


@pytest.mark.parametrize("method", ["/vllm.grpc.engine.VllmEngine/HealthCheck", "/grpc.health.v1.Health/Check"])
def test_the_health_of_other_engines_is_not_implemented(checkpoint: Path, method: str) -> None:
    async def work(served: Served) -> None:
        assert (await refused(served.channel.unary_unary(method)(b""))).code() is Code.UNIMPLEMENTED

    serving(checkpoint, work)


def test_there_is_no_profiler(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        for call in (
            served.stub.StartProfile(common.StartProfileRequest()),
            served.stub.StopProfile(common.StopProfileRequest()),
        ):
            assert (await refused(call)).code() is Code.UNIMPLEMENTED

    serving(checkpoint, work)


# Facts and loads ---------------------------------------------------------------------------------------


def test_the_model_is_described(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        answer = await served.stub.GetModelInfo(pb.GetModelInfoRequest())
        assert MessageToDict(answer, preserving_proto_field_name=True) == {
            "model_path": str(checkpoint),
            "tokenizer_path": str(checkpoint),
            "served_model_name": "m",
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "max_context_length": 8192,
            "max_req_input_len": 8191,
            "vocab_size": 3000,
            "eos_token_ids": [EOS],
            "default_sampling_params_json": '{"temperature": 0.5, "top_k": 20}',
        }

    serving(checkpoint, work)


def test_the_server_is_described(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        served.link.receive(Heartbeat(EngineStats(running=2, waiting=3, num_steps=9, cached_tokens=4)))
        found = await served.stub.GetServerInfo(pb.GetServerInfoRequest())
        arguments = MessageToDict(found.server_args)
        expected = {
            "model": str(checkpoint), "served_model_name": "m", "tokenizer": str(checkpoint), "tp_size": 1,
            "dp_size": 1, "context_length": 8192, "max_total_tokens": 64000, "max_running_requests": 5,
            "vocab_size": 3000, "page_size": 64, "disable_radix_cache": False,
        }  # fmt: skip
        assert arguments | expected == arguments
        assert (found.active_requests, found.max_total_num_tokens) == (5, 64000)
        counters = MessageToDict(found.scheduler_info)
        assert (counters["num_steps"], counters["cached_tokens"], counters["generation_tokens"]) == (9, 4, 0)
        assert found.tokenspeed_version == __version__
        assert found.uptime_seconds > 0 and found.start_time.seconds > 1_700_000_000

    serving(checkpoint, work, max_num_seqs=5)


ONE = EngineStats(
    running=2, waiting=1, blocks_total=100, blocks_used=25, blocks_cached=70, waiting_uncached_tokens=640,
    generation_rate=50.0, prompt_tokens=100, cached_tokens=75,
)  # fmt: skip
TWO = EngineStats(
    running=3,
    waiting=4,
    generation_rate=100.0,
    pools=[
        PoolStats(1, 0, 100, 50, prompt_tokens=10, cached_tokens=5),
        PoolStats(2, 4, 100, 100, waiting_uncached_tokens=7),
    ],
)


def test_the_load_is_that_of_the_last_step(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        idle = await served.stub.GetLoads(pb.GetLoadsRequest())
        assert [load.token_usage for load in idle.loads] == [0.0]
        served.link.receive(Heartbeat(ONE))
        found = await served.stub.GetLoads(pb.GetLoadsRequest())
        (load,) = found.loads
        assert (found.dp_rank_count, load.dp_rank, found.version) == (1, 0, __version__)
        assert (load.num_running_reqs, load.num_waiting_reqs, load.num_total_reqs) == (2, 1, 3)
        assert (load.num_used_tokens, load.max_total_num_tokens, load.max_running_requests) == (1600, 6400, 4)
        assert (load.num_waiting_uncached_tokens, load.gen_throughput, load.cache_hit_rate) == (640, 50.0, 0.75)
        assert (load.token_usage, load.active_token_usage, load.utilization) == (0.25, 0.25, 0.5)
        assert not load.HasField("queues") and not load.HasField("memory")
        assert (found.aggregate.total_running_reqs, found.aggregate.total_waiting_reqs) == (2, 1)

    serving(checkpoint, work, max_num_seqs=4)


def test_every_pool_has_its_own_load(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        served.link.receive(Heartbeat(TWO))
        found = await served.stub.GetLoads(pb.GetLoadsRequest(include=["all"]))
        assert [(load.dp_rank, load.num_running_reqs, load.queues.waiting) for load in found.loads] == [
            (0, 1, 0), (1, 2, 4)
        ]  # fmt: skip
        assert [load.token_usage for load in found.loads] == [0.5, 1.0]
        assert [load.gen_throughput for load in found.loads] == [50.0, 50.0]
        total = found.aggregate
        assert (total.total_reqs, total.avg_token_usage, total.avg_throughput, total.avg_utilization) == (
            7, 0.75, 50.0, 0.375
        )  # fmt: skip
        (load,) = (await served.stub.GetLoads(pb.GetLoadsRequest(dp_rank=1))).loads
        assert (load.dp_rank, load.num_waiting_uncached_tokens) == (1, 7)
        for rank in (2, -1):
            error = await refused(served.stub.GetLoads(pb.GetLoadsRequest(dp_rank=rank)))
            assert error.code() is Code.INVALID_ARGUMENT and "dp_rank" in str(error.details())

    serving(checkpoint, work, max_num_seqs=4)


# The tokenizer's files ---------------------------------------------------------------------------------


def test_the_tokenizer_arrives_as_a_zip_of_its_files(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "CHUNK_BYTES", 5000)

    async def work(served: Served) -> None:
        chunks = await read(served.stub.GetTokenizer(common.GetTokenizerRequest()))
        whole = b"".join(chunk.data for chunk in chunks)
        assert len(chunks) == -(-len(whole) // 5000) > 1
        assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].sha256 == hashlib.sha256(whole).hexdigest()
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            assert archive.namelist() == [
                "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"
            ]  # fmt: skip
            for name in archive.namelist():
                assert archive.read(name) == (checkpoint / name).read_bytes()
            loaded = tokenizers.Tokenizer.from_buffer(archive.read("tokenizer.json"))
        assert loaded.encode("Hello there").ids == served.engine.tokenizer.encode("Hello there")
        again = await read(served.stub.GetTokenizer(common.GetTokenizerRequest()))
        assert again == chunks

    serving(checkpoint, work)


def test_the_same_files_are_the_same_zip_at_any_time(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        first = tokenizer_files.zipped(served.engine.config)
        (checkpoint / "tokenizer.json").touch()
        assert tokenizer_files.zipped(served.engine.config) == first

    serving(checkpoint, work)


def test_files_that_went_away_are_an_internal_error_that_names_them(tmp_path: Path) -> None:
    write_model(tmp_path)

    async def work(served: Served) -> None:
        for file in tmp_path.iterdir():
            file.unlink()
        error = await refused(served.stub.GetTokenizer(common.GetTokenizerRequest()))
        assert error.code() is Code.INTERNAL and str(tmp_path) in str(error.details())

    serving(tmp_path, work)


@pytest.mark.parametrize("size", [0, 1, 5])
def test_a_bundle_of_any_size_has_one_digest(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "CHUNK_BYTES", 5)
    (chunk,) = tokenizer_files.chunks_of(b"x" * size)
    assert chunk.data == b"x" * size and chunk.sha256 == hashlib.sha256(b"x" * size).hexdigest()


# The cache ---------------------------------------------------------------------------------------------


def test_a_cache_is_flushed_once_nothing_runs(checkpoint: Path) -> None:
    async def flush(served: Served, seconds: float) -> tuple[bool, str]:
        answer = await served.stub.FlushCache(common.FlushCacheRequest(timeout_s=seconds))
        return answer.success, answer.message

    async def work(served: Served) -> None:
        assert await flush(served, 0.0) == (True, "3 blocks freed")
        call = served.generate()
        (submit,) = await served.link.submits(1)
        for seconds in (0.0, 0.05, float("nan")):
            assert await flush(served, seconds) == (False, "requests are running; give a timeout_s")
        assert served.link.drops == 1
        flushing = asyncio.create_task(flush(served, 10.0))
        await asyncio.sleep(0.05)
        assert not flushing.done()
        served.link.give(submit.id, 100, EOS, finish=Finish.STOP)
        await read(call)
        assert await flushing == (True, "3 blocks freed") and served.link.drops == 2
        served.link.receive(Heartbeat(EngineStats(waiting=1)))  # one that came over HTTP, say
        assert not (await flush(served, 0.0))[0]

    serving(checkpoint, work)


def tokens(name: int) -> list[int]:
    return [name % 1000 + offset for offset in range(BLOCK)]


def heard(*changes: tuple[int, int | None] | int | None, pool: int = 0) -> CacheEvents:
    """(hash, parent) is stored, a hash alone removed, None clears all."""
    records: list[tuple[int, int, int, int]] = []
    ids: list[int] = []
    for change in changes:
        if change is None:
            records.append((0, 0, CacheChange.CLEARED, 0))
        elif isinstance(change, int):
            records.append((change, 0, CacheChange.REMOVED, 0))
        else:
            records.append((change[0], change[1] or 0, CacheChange.STORED, change[1] is not None))
            ids += tokens(change[0])
    return CacheEvents(pool, np.array(records, CACHE_RECORD).tobytes(), np.array(ids, np.int32).tobytes())


def events(batch: common.KvEventBatch) -> list[Any]:
    """A batch in short: (parent, hashes) of a run of stored blocks, hashes of removed ones, or "cleared"."""
    short: list[Any] = []
    for event in batch.events:
        match event.WhichOneof("data"):
            case "stored":
                stored = event.stored
                assert stored.tier == common.KV_CACHE_TIER_DEVICE
                for block in stored.blocks:
                    assert (list(block.token_ids), block.block_size) == (tokens(block.block_hash), BLOCK)
                parent = stored.parent_block_hash if stored.HasField("parent_block_hash") else None
                short.append((parent, [block.block_hash for block in stored.blocks]))
            case "removed":
                short.append(list(event.removed.block_hashes))
            case "cleared":
                short.append("cleared")
    return short


def watching(served: Served, start: int = 0) -> AsyncIterator[common.KvEventBatch]:
    request = common.SubscribeKvEventsRequest(start_sequence_number=start)
    return aiter(served.stub.SubscribeKvEvents(request, timeout=20.0))


def test_what_becomes_of_blocks_is_told_in_runs(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        batches = watching(served)
        first = await anext(batches)
        assert events(first) == ["cleared"] and first.HasField("snapshot")
        number = first.sequence_number
        served.link.receive(heard((7, None), (-8, 7), (9, -8), (20, 7), (30, None), 30, (31, 30)))
        served.link.receive(heard(9, -8, (9, 7), 20, None, (1, 0)))
        served.link.receive(heard((5, None), None, (6, 5), pool=1))
        second, third, fourth = [await anext(batches) for _ in range(3)]
        assert [batch.sequence_number - number for batch in (second, third, fourth)] == [1, 2, 3]
        assert events(second) == [(None, [7, -8, 9]), (7, [20]), (None, [30]), [30], (30, [31])]
        assert events(third) == [[9, -8], (7, [9]), [20], "cleared", (0, [1])]
        # The other pool was cleared while this one has a block. A cursor is the stream's: no rank has one of its own.
        assert events(fourth) == [(None, [5]), [5], (5, [6])] and not fourth.HasField("dp_rank")
        assert second.timestamp > 1_700_000_000 and not second.HasField("snapshot")
        assert {event.event_id for event in third.events} == {third.sequence_number}

    serving(checkpoint, work, cache_events=True)


def test_who_comes_back_goes_on_where_it_was_and_who_missed_some_sees_all(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_watch, "CHUNK_EVENTS", 2)

    async def work(served: Served) -> None:
        served.engine._cache = cache_watch.CacheWatch(BLOCK, on=True, history=3, numbers_from=0)
        for name in range(1, 6):
            served.link.receive(heard((name, name - 1 or None)))
        later = await anext(watching(served, 5))
        assert (later.sequence_number, events(later), later.HasField("snapshot")) == (6, [(4, [5])], False)
        batches = watching(served)
        chunks = [await anext(batches) for _ in range(3)]
        assert [events(chunk) for chunk in chunks] == [["cleared", (None, [1, 2])], [(2, [3, 4])], [(4, [5])]]
        assert [chunk.sequence_number for chunk in chunks] == [4, 5, 6]
        parts = [(chunk.snapshot.index, chunk.snapshot.count, chunk.snapshot.blocks) for chunk in chunks]
        assert parts == [(0, 3, 5), (1, 3, 5), (2, 3, 5)]
        assert {event.event_id for chunk in chunks for event in chunk.events} == {0}
        served.link.receive(heard(5))
        assert events(await anext(batches)) == [[5]]

    serving(checkpoint, work, cache_events=True)


def test_a_cache_that_died_with_its_engine_is_cleared_and_the_end_is_told(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        batches = watching(served)
        assert events(await anext(batches)) == ["cleared"]
        served.link.receive(heard((7, None)))
        assert events(await anext(batches)) == [(None, [7])]
        served.link.receive(Lost("killed"))
        assert events(await anext(batches)) == ["cleared"]
        served.link.receive(Failed("again", config=False))
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            while True:
                await anext(batches)
        assert ended.value.code() is Code.UNAVAILABLE

    serving(checkpoint, work, cache_events=True)


def test_without_an_account_of_the_cache_there_is_nothing_to_follow(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        error = await refused(served.stub.SubscribeKvEvents(common.SubscribeKvEventsRequest()))
        assert error.code() is Code.UNIMPLEMENTED and "--cache-events" in str(error.details())

    serving(checkpoint, work)
