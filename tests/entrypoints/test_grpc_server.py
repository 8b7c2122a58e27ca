"""Generate and Abort over gRPC: what arrives, what the engine is told, and how calls end."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import ParseDict
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tests.entrypoints.grpc_served import EOS, Link, Served, one, read, refused, serving, write_model
from tokenspeed.batch import Finish
from tokenspeed.engine.messages import Lost, Refused
from tokenspeed.entrypoints.grpc import server as grpc_server
from tokenspeed.entrypoints.grpc.pace import pause_beside
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.request import TokenLogprob

SCRIPT = [*range(100, 140), EOS]
Code = grpc.StatusCode


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grpc")
    write_model(folder)
    return folder


def ids_of(messages: list[pb.GenerateResponse], index: int = 0) -> list[int]:
    return [
        id for message in messages if message.chunk.index + message.complete.index == index
        for id in (*message.chunk.token_ids, *message.complete.output_ids)
    ]  # fmt: skip


@pytest.mark.parametrize("pause", [0.0, 0.01, 30.0])
@pytest.mark.parametrize("stream", [True, False])
def test_the_ids_are_the_same_however_they_gather_and_the_end_waits_for_nothing(
    checkpoint: Path, pause: float, stream: bool
) -> None:
    async def work(served: Served) -> None:
        messages = await asyncio.wait_for(read(served.generate(stream=stream)), 10)
        assert ids_of(messages) == SCRIPT[:-1]
        assert [message.WhichOneof("response") for message in messages].count("complete") == 1
        last = messages[-1].complete
        assert (last.finish_reason, last.prompt_tokens, last.completion_tokens) == ("stop", 3, len(SCRIPT))
        assert (len(messages) > 1) == stream

    serving(checkpoint, work, link=Link(script=SCRIPT), pause=pause)


def test_more_streams_rest_longer_up_to_a_bound() -> None:
    rests = [pause_beside(number) for number in range(1, 1000)]
    assert rests == sorted(rests) and rests[0] < 0.001 and rests[-1] == 0.05
    assert 0.015 < pause_beside(64) < 0.02, "what its documentation says"


def test_a_first_token_waits_for_no_other(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        call = served.generate()
        (submit,) = await served.link.submits(1)
        served.link.give(submit.id, 100)
        first = await asyncio.wait_for(one(call), 10)
        assert list(first.chunk.token_ids) == [100]
        call.cancel()

    serving(checkpoint, work, pause=30.0)


def test_the_engine_is_asked_what_the_request_says_and_for_no_text(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        sampling = pb.SamplingParams()
        ParseDict({"topP": 0.5, "customParams": {"priority": 4, "cache_salt": "s"}, "samplingSeed": "9"}, sampling)
        call = served.stub.Generate(
            pb.GenerateRequest(request_id="r", tokenized={"input_ids": [7, 8]}, sampling_params=sampling)
        )
        (submit,) = await served.link.submits(1)
        assert (submit.prompt, submit.priority, submit.salt) == (b"\7\0\0\0\10\0\0\0", 4, b"s")
        params = served.link.params()
        assert (params.top_p, params.temperature, params.top_k, params.seed) == (0.5, 0.5, 20, 9)
        assert params.max_tokens == 8192 - 2, "what is left of the context"
        call.cancel()

    serving(checkpoint, work)


def test_a_stop_string_ends_an_answer_in_the_engine_as_well(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        ids = served.engine.tokenizer.encode("and then STOP, and more")
        call = served.generate(sampling={"stop": ["STOP"]})
        (submit,) = await served.link.submits(1)
        served.link.give(submit.id, *ids)
        messages = await read(call)
        told = ids_of(messages)
        assert told == ids[: len(told)] and 0 < len(told) < len(ids)
        assert served.engine.tokenizer.decode(told).endswith("STOP")
        assert messages[-1].complete.matched_stop_str == "STOP"
        assert served.link.finished == [(submit.id, len(told))] and not served.link.aborted

    serving(checkpoint, work)


def test_log_probabilities_arrive_with_their_tokens(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        call = served.generate(return_logprob=True, top_logprobs_num=1)
        (submit,) = await served.link.submits(1)
        assert served.link.params().logprobs == 1
        entries = [TokenLogprob(id, -0.5, 1, (id,), (-0.5,)) for id in (100, EOS)]
        served.link.give(submit.id, 100, EOS, finish=Finish.STOP, logprobs=entries)
        chunk, end = await read(call)
        assert list(chunk.chunk.output_logprobs.token_ids) == [100]
        assert list(chunk.chunk.output_logprobs.top_logprobs[0].token_ids) == [100]
        assert not end.complete.HasField("output_logprobs")

    serving(checkpoint, work)


def test_choices_of_one_call_are_told_apart(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        call = served.generate(sampling={"n": 2})
        first, second = await served.link.submits(2)
        assert first.seed != second.seed
        served.link.give(first.id, 100)
        served.link.give(second.id, 200, finish=Finish.LENGTH)
        served.link.give(first.id, EOS, finish=Finish.STOP)
        messages = await read(call)
        assert (ids_of(messages, 0), ids_of(messages, 1)) == ([100], [200])
        ends = {message.complete.index: message.complete.finish_reason for message in messages if message.HasField(
            "complete"
        )}  # fmt: skip
        assert ends == {0: "stop", 1: "length"} and len(messages) == 4

    serving(checkpoint, work)


def test_an_aborted_request_ends_as_such_with_what_it_has_and_again_is_fine(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        call = served.generate("mine")
        (submit,) = await served.link.submits(1)
        served.link.give(submit.id, 100)
        assert list((await one(call)).chunk.token_ids) == [100]
        answer = await served.stub.Abort(pb.AbortRequest(request_id="mine", reason="no reader"))
        assert answer.success
        (end,) = await read(call)
        assert (end.complete.finish_reason, end.complete.completion_tokens) == ("abort", 1)
        assert served.link.aborted == [submit.id]
        for id in ("mine", "nobody's", ""):
            assert (await served.stub.Abort(pb.AbortRequest(request_id=id))).success
        assert served.link.aborted == [submit.id]

    serving(checkpoint, work)


def test_an_abort_reaches_the_children_that_a_gateway_made_and_no_others(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        names = ["a", "a-n0", "a-n12", "a-n", "a-nx", "ab-n0", "b"]
        calls = {}
        for count, name in enumerate(names, 1):
            calls[name] = served.generate(name)
            submits = await served.link.submits(count)
        await served.stub.Abort(pb.AbortRequest(request_id="a"))
        ended = {}
        for name in ("a", "a-n0", "a-n12"):
            ended[name] = (await read(calls[name]))[-1].complete.finish_reason
        assert set(ended.values()) == {"abort"}
        assert sorted(served.link.aborted) == sorted(submits[names.index(name)].id for name in ended)
        for call in calls.values():
            call.cancel()

    serving(checkpoint, work)


@pytest.mark.parametrize("choices", [1, 2])
def test_an_abort_does_not_wait_for_a_first_token(checkpoint: Path, choices: int) -> None:
    async def work(served: Served) -> None:
        # Longer than a KV block: the second choice waits for the first one's first token.
        call = served.generate("slow", range(1, 200), sampling={"n": choices})
        await served.link.submits(1)
        await served.stub.Abort(pb.AbortRequest(request_id="slow"))
        messages = await asyncio.wait_for(read(call), 10)
        assert [message.complete.finish_reason for message in messages] == ["abort"] * choices
        assert len(served.link.submitted) == 1 and served.link.submitted[0].id in served.link.aborted

    serving(checkpoint, work)


def test_a_client_that_cancels_or_is_past_its_deadline_ends_the_engines_work(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        begun = served.generate("begun")
        (submit,) = await served.link.submits(1)
        waiting = served.generate("waiting")
        await served.link.submits(2)
        served.link.give(submit.id, 100)
        await one(begun)
        begun.cancel()
        waiting.cancel()
        await served.link.until(lambda link: len(link.aborted) == 2)
        late = served.generate("late", timeout=0.5)
        assert (await refused(late)).code() is Code.DEADLINE_EXCEEDED
        await served.link.until(lambda link: len(link.aborted) == 3)
        assert sorted(served.link.aborted) == [submit.id for submit in served.link.submitted]
        again = served.generate("begun")
        await served.link.submits(4)
        again.cancel()

    serving(checkpoint, work)


def test_an_id_in_use_is_refused_for_that_call_alone_and_free_again_afterwards(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        first = served.generate("same")
        (submit,) = await served.link.submits(1)
        error = await refused(served.generate("same"))
        assert error.code() is Code.ALREADY_EXISTS and "'same'" in str(error.details())
        assert len(served.link.submitted) == 1
        served.link.give(submit.id, 100, EOS, finish=Finish.STOP)
        assert ids_of(await read(first)) == [100]
        second = served.generate("same")
        served.link.give((await served.link.submits(2))[1].id, 101, EOS, finish=Finish.STOP)
        assert ids_of(await read(second)) == [101]

    serving(checkpoint, work)


def test_a_defect_of_ours_ends_its_call_alone_and_keeps_its_secrets(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(served: Served) -> None:
        first = served.generate("first")
        (submit,) = await served.link.submits(1)
        with monkeypatch.context() as broken:
            broken.setattr(served.engine, "submit", lambda *_, **__: 1 / 0)
            error = await refused(served.generate("second"))
        assert error.code() is Code.INTERNAL and "division" not in str(error.details())
        served.link.give(submit.id, 100, EOS, finish=Finish.STOP)
        assert ids_of(await read(first)) == [100]

    serving(checkpoint, work)
    assert "request second is ended" in caplog.text and "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"ids": []}, "tokenized.input_ids"),
        ({"ids": [3000]}, "3000"),
        ({"ids": [1] * 8192}, "maximum context length is 8192"),
        ({"id": ""}, "request_id"),
        ({"sampling": {"temperature": -1.0}}, "temperature"),
        ({"sampling": {"top_p": 0.0}}, "top_p"),
        ({"sampling": {"max_new_tokens": 0}}, "max_tokens"),
        ({"sampling": {"n": 1000}}, "n must be between 1 and"),
        ({"sampling": {"stop_token_ids": [3000]}}, "stop_token_ids"),
        ({"sampling": {"logit_bias": {"x": 1.0}}}, "logit_bias"),
        ({"sampling": {"regex": "("}}, "regex"),
        ({"return_logprob": True, "top_logprobs_num": 21}, "logprobs"),
        ({"logprob_start_len": 0}, "logprob_start_len"),
        ({"data_parallel_rank": 0}, "data_parallel_rank"),
    ],
)
def test_what_makes_no_sense_is_an_invalid_argument_that_names_it(
    checkpoint: Path, fields: dict[str, Any], word: str
) -> None:
    async def work(served: Served) -> None:
        error = await refused(served.generate(**fields))
        assert error.code() is Code.INVALID_ARGUMENT and word in str(error.details())
        assert not served.link.submitted and not served.server._servicer.calls

    serving(checkpoint, work)


def test_an_engine_without_room_says_when_to_come_again(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        error = await refused(served.generate())
        assert error.code() is Code.RESOURCE_EXHAUSTED
        assert ("retry-after", "7") in tuple(error.trailing_metadata())
        served.link.refusal = Refused(id=0, reason="INVALID", detail="no such thing", param="prompt")
        assert (await refused(served.generate())).code() is Code.INVALID_ARGUMENT

    serving(checkpoint, work, link=Link(refusal=Refused(id=0, reason="QUEUE_FULL", retry_after=7)))


def test_an_answer_that_breaks_is_an_internal_error_with_its_words(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        call = served.generate()
        (submit,) = await served.link.submits(1)
        served.link.give(submit.id, 100)
        await one(call)
        served.link.give(submit.id, finish=Finish.ERROR, error="the values were not finite")
        error = await refused(call)
        assert error.code() is Code.INTERNAL and error.details() == "the values were not finite"
        assert served.metrics.finished == {"error": 1}

    serving(checkpoint, work)


def test_an_engine_that_dies_leaves_nobody_waiting(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        running = served.generate("a")
        (submit,) = await served.link.submits(1)
        waiting = served.generate("b", range(1, 200), sampling={"n": 2})
        await served.link.submits(2)
        served.link.give(submit.id, 100)
        await one(running)
        served.link.receive(Lost("killed"))
        for call in (running, waiting):
            assert (await asyncio.wait_for(refused(call), 10)).code() is Code.UNAVAILABLE
        assert (await refused(served.generate("c"))).code() is Code.UNAVAILABLE
        served.link.ready()
        served.link.script = SCRIPT
        assert ids_of(await read(served.generate("d"))) == SCRIPT[:-1]

    serving(checkpoint, work)


def test_new_calls_are_refused_while_the_server_drains_and_old_ones_go_on(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        call = served.generate()
        (submit,) = await served.link.submits(1)
        served.server.drain()
        error = await refused(served.generate("new"))
        assert error.code() is Code.UNAVAILABLE and "shutting down" in str(error.details())
        stopping = asyncio.create_task(served.engine.stop(10.0))
        served.link.give(submit.id, 100, EOS, finish=Finish.STOP)
        assert ids_of(await read(call)) == [100]
        await stopping
        assert (await refused(served.generate("newer"))).code() is Code.UNAVAILABLE
        await served.server.close()
        await served.server.close()

    serving(checkpoint, work)


def test_a_client_that_reads_nothing_is_ended_and_the_others_go_on(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "STALL_POLL_SECONDS", 0.05)
    entries = [TokenLogprob(5, -1.0, 1, tuple(range(20)), tuple(map(float, range(20))))] * 500

    async def work(served: Served) -> None:
        stalled = served.generate("stalled", return_logprob=True, top_logprobs_num=20)
        await served.link.submits(1)
        other = served.generate("other")
        first, second = await served.link.submits(2)
        given = 0
        async with asyncio.timeout(20):
            while not served.link.aborted:
                served.link.give(first.id, *[5] * 500, logprobs=entries)
                given += 500
                await asyncio.sleep(0.01)
        assert served.link.aborted == [first.id]
        assert "stalled" not in served.server._servicer.calls
        told = []
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            async for message in stalled:
                told += message.chunk.token_ids
        assert ended.value.code() is Code.DEADLINE_EXCEEDED and "reads nothing" in str(ended.value.details())
        assert 0 < len(told) < given
        served.link.give(second.id, 100, EOS, finish=Finish.STOP)
        assert ids_of(await read(other)) == [100]

    serving(checkpoint, work, limits=Limits(reader_seconds=0.3, heartbeat_seconds=60.0))


def test_a_client_that_has_read_everything_may_wait_for_as_long_as_it_takes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "STALL_POLL_SECONDS", 0.02)

    async def work(served: Served) -> None:
        call = served.generate()
        (submit,) = await served.link.submits(1)
        served.link.give(submit.id, 100)
        await one(call)
        await asyncio.sleep(0.3)
        served.link.give(submit.id, 101, EOS, finish=Finish.STOP)
        assert ids_of(await read(call)) == [101]

    serving(checkpoint, work, limits=Limits(reader_seconds=0.1, heartbeat_seconds=60.0))


def test_one_that_never_reads_the_end_of_it_either_is_no_trouble_when_it_leaves(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(grpc_server, "STALL_POLL_SECONDS", 0.05)
    entries = [TokenLogprob(5, -1.0, 1, tuple(range(20)), tuple(map(float, range(20))))] * 500

    async def work(served: Served) -> None:
        call = served.generate(return_logprob=True, top_logprobs_num=20)
        (submit,) = await served.link.submits(1)
        async with asyncio.timeout(20):
            while not served.link.aborted:
                served.link.give(submit.id, *[5] * 500, logprobs=entries)
                await asyncio.sleep(0.01)
        call.cancel()

    serving(checkpoint, work, limits=Limits(reader_seconds=0.2, heartbeat_seconds=60.0))
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_tokens_and_ends_are_counted_evenly_however_they_gather(checkpoint: Path) -> None:
    async def work(served: Served) -> None:
        call = served.generate()
        (submit,) = await served.link.submits(1)
        served.link.give(submit.id, 100)
        await one(call)
        for id in (101, 102, 103):
            served.link.give(submit.id, id, queue_seconds=0.0)
            await asyncio.sleep(0.01)
        served.link.give(submit.id, 104, EOS, finish=Finish.STOP)
        await read(call)
        metrics = served.metrics
        assert metrics.finished == {"stop": 1}
        assert sum(metrics.first_token.counts) == sum(metrics.end_to_end.counts) == sum(metrics.queue.counts) == 1
        assert sum(metrics.inter_token.counts) == 5
        assert sorted(metrics.inter_token.counts)[-1] == 5, "all five in one bucket"

    serving(checkpoint, work, pause=30.0)
