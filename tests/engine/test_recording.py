"""An engine whose control plane is recorded: the file says all that happened, and can be made to happen again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.toy import toy_llama
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams
from tokenspeed._core.record import Call, Frames
from tokenspeed._core.replay import replay
from tokenspeed.engine.link import EngineLink, InProcessLink, ProcessLink
from tokenspeed.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    toy_llama(path)
    return path


def config(folder: Path, record: Path) -> EngineConfig:
    return EngineConfig(
        model=str(folder), dtype="float32", block_size=16, num_threads=1, record=str(record), cache_events=True
    )


@pytest.mark.parametrize("link", [InProcessLink, lambda: ProcessLink(log_level="error")], ids=["inside", "child"])
def test_a_recorded_engine_is_replayed_to_the_same_state(folder: Path, tmp_path: Path, link: type[EngineLink]) -> None:
    file = tmp_path / "calls"

    async def run() -> None:
        async with AsyncEngine(config(folder, file), link=link()) as engine:
            one, two = SamplingParams(temperature=0.0, max_tokens=20), SamplingParams(max_tokens=500, ignore_eos=True)
            async for _ in engine.generate(list(range(3, 60)), one, prompt_cache_key="talk", tps_floor=0.5):
                pass
            async for _ in engine.generate([5, 6], two):
                break
            await engine.generate(list(range(3, 60)), one, prompt_cache_key="talk").__anext__()
            await engine.drop_cached()
        await engine.abort("nobody")

    asyncio.run(run())
    assert file.stat().st_mode & 0o777 == 0o600
    calls = [frame for frame in Frames(file) if isinstance(frame, Call)]
    submits = [call.kwargs for call in calls if call.method == "submit"]
    assert [submit["tps_floor"] for submit in submits] == [0.5, None, None]
    assert submits[0]["session"] == submits[2]["session"] > submits[1]["session"] == 0
    assert {"construct", "abort", "plan", "commit", "drop_cached"} <= {call.method for call in calls}
    assert calls[-1].method == "dump"
    again = replay(file, check=True)
    assert (again.difference, again.calls, again.unanswered, again.torn) == (None, len(calls), False, 0)


def test_a_recording_that_cannot_be_made_is_one_line_and_overwrites_nothing(folder: Path, tmp_path: Path) -> None:
    async def run(file: Path) -> None:
        async with AsyncEngine(config(folder, file), in_process=True):
            raise AssertionError("it started")

    kept = tmp_path / "kept"
    kept.write_text("mine")
    for file, why in ((kept, "File exists"), (tmp_path / "no" / "x", "No such file or directory")):
        with pytest.raises(ConfigError) as refused:
            asyncio.run(run(file))
        assert str(refused.value) == f"--record {file}: {why}"
    assert kept.read_text() == "mine"


def test_an_engine_that_cannot_be_loaded_leaves_no_recording(tmp_path: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(tmp_path / "nowhere", tmp_path / "calls"), in_process=True):
            raise AssertionError("it started")

    with pytest.raises(ConfigError, match="nowhere"):
        asyncio.run(run())
    assert not (tmp_path / "calls").exists()
