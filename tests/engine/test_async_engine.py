"""`AsyncEngine` and `LLM` as an application meets them: refusals, aborts, cancellation, the end of an engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.toy import VOCAB_SIZE, toy_llama
from tokenspeed import LLM, AsyncEngine, EngineConfig, SamplingParams
from tokenspeed.engine.async_engine import EngineFailed
from tokenspeed.engine.link import ProcessLink
from tokenspeed.engine.messages import Submit
from tokenspeed.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthExceeded,
    InvalidRequest,
    QueueFull,
    Unavailable,
)

LONG = SamplingParams(temperature=0.0, max_tokens=900, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    toy_llama(path)
    return path


def config(folder: Path, **changes: object) -> EngineConfig:
    settings: dict[str, object] = {"model": str(folder), "dtype": "float32", "block_size": 16, "num_threads": 1}
    return EngineConfig(**(settings | changes))  # type: ignore[arg-type]


async def at_rest(engine: AsyncEngine) -> None:
    """Everything is free within the time that two steps and a heartbeat take."""
    for _ in range(40):
        stats = engine.stats()
        if (stats.running, stats.waiting, stats.draining, stats.blocks_used) == (0, 0, 0, 0):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(engine.stats())


def test_a_request_that_cannot_be_served_is_refused_before_it_is_admitted(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            with pytest.raises(ContextLengthExceeded) as too_long:
                await engine.submit([5] * 1000, SamplingParams(max_tokens=100))
            assert too_long.value.code == "context_length_exceeded" and too_long.value.param == "prompt"
            for prompt, params, field in [
                ([], SHORT, "prompt"),
                ("", SHORT, "prompt"),
                ([VOCAB_SIZE], SHORT, "prompt"),
                ([-1], SHORT, "prompt"),
                ([1], SamplingParams(temperature=-1.0), "temperature"),
                ([1], SamplingParams(logit_bias={VOCAB_SIZE: 1.0}), "logit_bias"),
                ([1], SamplingParams(min_tokens=2, allowed_token_ids=(2,)), "min_tokens"),
                ([1], SamplingParams(max_tokens=2, min_tokens=3), "min_tokens"),
                ([1], SamplingParams(stop="###"), "stop"),  # type: ignore[arg-type]
                ([1], SamplingParams(top_k=1.5), "top_k"),  # type: ignore[arg-type]
                ([1], SamplingParams(top_k=10**30), "top_k"),
                ([1], SamplingParams(ignore_eos=1), "ignore_eos"),  # type: ignore[arg-type]
                ([1], SamplingParams(bad_word_ids=((),)), "bad_word_ids"),
                ([1], SamplingParams(repetition_penalty=1e-300), "repetition_penalty"),
                ([True, 1], SHORT, "prompt"),
                (["a", 5], SHORT, "prompt"),
            ]:
                with pytest.raises(InvalidRequest) as refused:
                    await engine.submit(prompt, params)  # type: ignore[arg-type]
                assert refused.value.param == field
            for wrong in ({"priority": 2**31}, {"cache_salt": "\ud800"}, {"tps_floor": -1.0}):
                with pytest.raises(InvalidRequest) as refused:
                    await engine.submit([1], SHORT, **wrong)  # type: ignore[arg-type]
                assert refused.value.param == next(iter(wrong))
            await at_rest(engine)
            assert engine.stats().num_steps == 0

    asyncio.run(run())


def test_what_slips_past_the_front_end_is_refused_at_the_engines_own_door(folder: Path) -> None:
    def submit(id: int, prompt: list[int], params: bytes, **more: float) -> Submit:
        raw = np.array(prompt, dtype="<i4").tobytes()
        return Submit(id=id, prompt=raw, params=msgspec.Raw(params), seed=1, **more)  # type: ignore[arg-type]

    async def run() -> None:
        link = ProcessLink(log_level="error")
        engine = AsyncEngine(config(folder), link=link)
        await engine.start()
        good = msgspec.msgpack.encode(SHORT)
        for number, bad in enumerate(
            [
                submit(1002, [1], msgspec.msgpack.encode({"top_k": 1.5})),
                submit(1003, [1], msgspec.msgpack.encode({"temperature": -1.0})),
                submit(1004, [VOCAB_SIZE], good),
                submit(1005, [-1], good),
                submit(1006, [], good),
                submit(1007, [1], good, priority=2**40),
                submit(1008, [1], good, session=-1),
                submit(1009, [1], good, tps_floor=-1.0),
                submit(1010, [1], good, tps_floor=float("nan")),
            ]
        ):
            link.send(bad)
            assert [output async for output in engine.generate([5, 6], SHORT)], number
        await engine.generate([1], SHORT, priority=-(2**31)).__anext__()
        await at_rest(engine)
        await engine.stop()

    asyncio.run(run())


def test_ids_that_the_tokenizer_does_not_have_are_sampled_as_no_text(tmp_path: Path) -> None:
    toy_llama(tmp_path, vocab_size=VOCAB_SIZE + 88)

    async def run() -> None:
        async with AsyncEngine(config(tmp_path), in_process=True) as engine:
            pushed = SamplingParams(temperature=0.0, max_tokens=4, logit_bias={VOCAB_SIZE + 38: 100.0}, logprobs=2)
            outputs = [output async for output in engine.generate([1, 2], pushed)]
            assert [token for output in outputs for token in output.token_ids] == [VOCAB_SIZE + 38] * 4
            assert "".join(output.text for output in outputs) == ""

    asyncio.run(run())


def test_text_whose_ids_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    toy_llama(tmp_path, vocab_size=260)

    async def run() -> None:
        async with AsyncEngine(config(tmp_path), in_process=True) as engine:
            with pytest.raises(InvalidRequest, match="the model has ids 0 to 259"):
                await engine.submit("def return import tokenizer", SHORT)
            assert [output async for output in engine.generate([3], SHORT)]

    asyncio.run(run())


@pytest.mark.parametrize(("in_process", "seconds"), [(True, 0.0), (False, 0.0), (False, 0.05), (False, 0.3)])
def test_a_stop_while_starting_ends_both(folder: Path, in_process: bool, seconds: float) -> None:
    async def run() -> None:
        engine = AsyncEngine(config(folder), in_process=in_process)
        starting = asyncio.create_task(engine.start())
        await asyncio.sleep(seconds)
        await engine.stop(grace=0.0)
        with pytest.raises(EngineFailed):
            await asyncio.wait_for(starting, 20)
        assert engine.health().state == "dead"

    asyncio.run(run())


def test_a_dropped_cache_leaves_what_requests_hold_and_nothing_else(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            prompt = list(range(5, 85))

            async def cached() -> int:
                return max([output.num_cached_tokens async for output in engine.generate(prompt, SHORT)])

            assert (await cached(), await cached()) == (0, 64)
            await at_rest(engine)
            before = engine.stats().blocks_cached
            dropped = await engine.drop_cached()
            assert (dropped.num_blocks, dropped.num_held) == (before, 0) and before > 0
            running = await engine.submit(prompt, LONG)
            await anext(running)
            held = await engine.drop_cached()
            assert held.num_blocks == 0 and held.num_held >= 5
            assert await cached() == 64  # of the request that still runs
            await running.abort()
            await at_rest(engine)

    asyncio.run(run())


def test_an_abort_before_admission_ends_the_stream(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=False) as engine:
            pending = asyncio.create_task(engine.submit([1], LONG, request_id="early"))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert await engine.abort("early") is True
            stream = await pending
            assert [output.finish_reason async for output in stream] == ["abort"]
            await at_rest(engine)

    asyncio.run(run())


def test_leaving_early_cancelling_and_aborting_free_everything(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            outputs = engine.generate([1, 2, 3], LONG)
            async for _ in outputs:
                break
            await outputs.aclose()
            await at_rest(engine)

            async def consume() -> None:
                async for _ in engine.generate([4, 5, 6], LONG):
                    pass

            task = asyncio.create_task(consume())
            await asyncio.sleep(0.1)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await at_rest(engine)

            stream = await engine.submit([7, 8], SamplingParams(max_tokens=900, n=3, seed=1), request_id="mine")
            await anext(stream)
            assert await engine.abort("mine") is True
            rest = [output async for output in stream]
            assert sorted(output.index for output in rest if output.finish_reason == "abort") == [0, 1, 2]
            assert await engine.abort("mine") is False
            await at_rest(engine)
            assert engine.stats().num_aborts == 5
            assert engine.stats().slowest_abort_steps <= 2

    asyncio.run(run())


def test_a_full_queue_refuses_all_choices_of_a_request_or_none(folder: Path) -> None:
    async def run() -> None:
        small = config(folder, max_num_seqs=1, max_queued_requests=4)
        async with AsyncEngine(small, in_process=True) as engine:
            first = await engine.submit([1], LONG)
            await anext(first)
            second = await engine.submit([2], SamplingParams(max_tokens=5, n=3))
            with pytest.raises(QueueFull) as refused:
                await engine.submit([3], SamplingParams(max_tokens=5, n=2))
            assert refused.value.retry_after is not None and refused.value.retry_after >= 1
            with pytest.raises(InvalidRequest) as never:
                await engine.submit([3], SamplingParams(max_tokens=5, n=5))
            assert never.value.param == "n"
            await first.abort()
            await second.abort()
            await at_rest(engine)
            assert [output.token_ids async for output in engine.generate([3], SHORT)]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("length", "changes", "asked", "found"),
    [
        (100, {}, {}, 2 * 96),
        (10, {}, {}, 0),
        (100, {"enable_prefix_caching": False}, {}, 0),
        (100, {}, {"prompt_logprobs": 0}, 0),
        (100, {"max_num_seqs": 1}, {}, 2 * 96),
    ],
    ids=["long", "shorter than a block", "no cache", "prompt log-probabilities", "one at a time"],
)
def test_choices_after_the_first_find_its_prompt_in_the_cache(
    folder: Path, length: int, changes: dict[str, object], asked: dict[str, int], found: int
) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder, **changes), in_process=True) as engine:
            params = SamplingParams(temperature=1.0, max_tokens=6, n=3, seed=4, ignore_eos=True, **asked)
            outputs = [output async for output in engine.generate(list(range(3, 3 + length)), params)]
            assert [output.index for output in outputs if output.finish_reason == "length"] == [0, 1, 2]
            texts = [[t for o in outputs if o.index == index for t in o.token_ids] for index in range(3)]
            assert [len(ids) for ids in texts] == [6, 6, 6] and len(set(map(tuple, texts))) == 3
            await at_rest(engine)
            assert engine.stats().cached_tokens == found

    asyncio.run(run())


def test_an_abort_between_the_first_choice_and_the_others_ends_them_all(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder, max_num_seqs=1), in_process=True) as engine:
            blocker = await engine.submit([1], LONG)
            await anext(blocker)
            params = SamplingParams(max_tokens=5, n=3)
            waiting = asyncio.create_task(engine.submit(list(range(3, 53)), params, request_id="mine"))
            gone = asyncio.create_task(engine.submit(list(range(3, 53)), params))
            while engine.stats().waiting < 2:
                await asyncio.sleep(0.01)
            assert await engine.abort("mine") is True
            stream = await waiting
            assert sorted([output.index async for output in stream]) == [0, 1, 2]
            gone.cancel()
            with pytest.raises(asyncio.CancelledError):
                await gone
            await blocker.abort()
            await at_rest(engine)

    asyncio.run(run())


@pytest.mark.parametrize(("engines", "refused"), [(None, False), (0.0, False), (1e6, True)])
def test_only_a_given_floor_refuses_and_a_request_may_have_another(
    folder: Path, engines: float | None, refused: bool
) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder, tps_floor=engines), in_process=True) as engine:
            learned = SamplingParams(max_tokens=30, ignore_eos=True)
            async for _ in engine.generate([1, 2], learned, tps_floor=0.0):
                pass
            if refused:
                with pytest.raises(InvalidRequest, match="floor"):
                    await engine.submit([3], SHORT)
            else:
                await (await engine.submit([3], SHORT)).abort()
            assert [output async for output in engine.generate([3], SHORT, tps_floor=0.0)]
            with pytest.raises(InvalidRequest) as impossible:
                await engine.submit([3], SHORT, tps_floor=1e7)
            assert (impossible.value.param, impossible.value.retry_after) == ("tps_floor", None)
            await at_rest(engine)
            while engine.stats().refusals != {"floor_out_of_reach": 1 + refused}:  # seen with the next heartbeat
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_an_engine_that_is_over_says_so(folder: Path) -> None:
    async def run() -> None:
        engine = AsyncEngine(config(folder), in_process=True)
        with pytest.raises(Unavailable):
            await engine.submit([1], SHORT)
        await engine.start()
        assert engine.health().state == "ready"
        await engine.stop()
        assert engine.health().state == "dead"
        with pytest.raises(Unavailable):
            await engine.submit([1], SHORT)

    asyncio.run(run())


@pytest.mark.parametrize("in_process", [True, False])
def test_a_start_that_cannot_work_is_a_config_error(tmp_path: Path, in_process: bool) -> None:
    async def run(broken: EngineConfig) -> None:
        async with AsyncEngine(broken, in_process=in_process):
            raise AssertionError("it started")

    with pytest.raises(CheckpointError, match="nowhere"):
        asyncio.run(run(EngineConfig(model=str(tmp_path / "nowhere"))))
    toy_llama(tmp_path / "toy")
    with pytest.raises(ConfigError, match="--max-model-len"):
        asyncio.run(run(config(tmp_path / "toy", max_model_len=10**6)))


def test_a_killed_engine_process_ends_every_stream(folder: Path) -> None:
    async def run() -> None:
        link = ProcessLink(log_level="error")
        engine = AsyncEngine(config(folder), link=link)
        await engine.start()
        stream = await engine.submit([1, 2], LONG)
        await anext(stream)
        assert link.pid is not None
        os.kill(link.pid, signal.SIGKILL)
        with pytest.raises(Unavailable):
            async for _ in stream:
                pass
        assert engine.health().state == "dead"
        assert "killed by signal 9" in (engine.health().error or "")
        await engine.stop()

    asyncio.run(run())


def test_llm_is_the_blocking_face(folder: Path) -> None:
    with LLM(config=config(folder), in_process=True) as llm:
        one = llm.generate([1, 2, 3], SHORT)
        several = llm.generate([[1, 2, 3], [9, 9]], SHORT)
        assert len(one) == 1 and len(several) == 2
        assert one[0][0].token_ids == several[0][0].token_ids and len(one[0][0].token_ids) == 5
        assert one[0][0].finish_reason == "length"
        choices = llm.generate("def f(", SamplingParams(max_tokens=4, n=2, seed=3))[0]
        assert [choice.index for choice in choices] == [0, 1]
        with pytest.raises(InvalidRequest):
            llm.generate("", SHORT)
        assert llm.generate([1], SamplingParams(max_tokens=30, ignore_eos=True), tps_floor=0.001)[0][0].token_ids
        with pytest.raises(InvalidRequest, match="floor"):
            llm.generate([[1], [2]], SHORT, tps_floor=1e7)
    llm.close()
