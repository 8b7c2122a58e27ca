"""`AsyncEngine` and `LLM` as an application meets them: refusals, aborts, cancellation, the end of an engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest

from tests.toy import VOCAB_SIZE, toy_llama
from tokenspeed import LLM, AsyncEngine, EngineConfig, SamplingParams
from tokenspeed.engine.link import ProcessLink
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
            ]:
                with pytest.raises(InvalidRequest) as refused:
                    await engine.submit(prompt, params)
                assert refused.value.param == field
            await at_rest(engine)
            assert engine.stats().num_steps == 0

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
        small = config(folder, max_num_seqs=1, max_queued_requests=2)
        async with AsyncEngine(small, in_process=True) as engine:
            first = await engine.submit([1], LONG)
            await anext(first)
            with pytest.raises(QueueFull) as refused:
                await engine.submit([2], SamplingParams(max_tokens=5, n=4))
            assert refused.value.retry_after is not None and refused.value.retry_after >= 1
            await first.abort()
            await at_rest(engine)
            assert [output.token_ids async for output in engine.generate([3], SHORT)]

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
    llm.close()
