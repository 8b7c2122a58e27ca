"""A dead engine is replaced: at once, then ever later, and not for ever."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.toy import toy_llama
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams
from tokenspeed.engine import supervisor
from tokenspeed.engine.link import Heard, ProcessLink, Receive
from tokenspeed.engine.messages import Abort, Failed, Heartbeat, Lost, Ready, ToEngine
from tokenspeed.engine.supervisor import SupervisedLink
from tokenspeed.errors import Unavailable

READY = Ready(max_model_len=8, num_blocks=1, block_size=16, summary="")


class ScriptedLink:
    """An engine that says what it is told to when it starts."""

    def __init__(self, says: list[Heard]) -> None:
        self.says = says
        self.config = EngineConfig()
        self.receive: Receive = lambda message: None
        self.sent: list[ToEngine] = []
        self.stopped = False
        self.killed = False

    async def start(self, config: EngineConfig, receive: Receive) -> None:
        self.config, self.receive = config, receive
        for message in self.says:
            receive(message)

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)

    def kill(self) -> None:
        self.killed = True
        self.receive(Failed("the engine process is gone (killed by signal 9)", config=False))

    async def stop(self) -> None:
        self.stopped = True
        if not self.killed and not any(isinstance(message, Failed) for message in self.says):
            self.receive(Failed("the engine process is gone (exit status 0)", config=False))


class Supervised:
    """A supervised link over scripted engines, with what was heard and how long it waited."""

    def __init__(self, *scripts: list[Heard], restarts: int, silence: float = 0.0) -> None:
        self.links = [ScriptedLink(list(says)) for says in scripts]
        waiting = iter(self.links)
        self.link = SupervisedLink(lambda: next(waiting), restarts=restarts, silence=silence)
        self.heard: list[Heard] = []

    async def run(self, config: EngineConfig | None = None) -> list[str]:
        await self.link.start(config or EngineConfig(), self.heard.append)
        for _ in range(50):
            await asyncio.sleep(0)
        return [type(message).__name__ for message in self.heard]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    made: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        made.append(seconds)
        await real(0)

    quick = SimpleNamespace(sleep=sleep, create_task=asyncio.create_task, gather=asyncio.gather)
    monkeypatch.setattr(supervisor, "asyncio", quick)
    return made


DEATH = Failed("it broke", config=False)


def test_restarts_come_at_once_then_after_longer_and_longer_and_end(pauses: list[float]) -> None:
    supervised = Supervised([READY, DEATH], [READY, DEATH], [DEATH], [DEATH], restarts=3)
    assert asyncio.run(supervised.run()) == ["Ready", "Lost", "Ready", "Lost", "Lost", "Failed"]
    assert pauses == [0.0, 1.0, 2.0]
    last = supervised.heard[-1]
    assert isinstance(last, Failed) and not last.config and "3 restarts within 600 s" in last.error
    assert [link.stopped for link in supervised.links] == [True, True, True, False]


@pytest.mark.parametrize(
    ("scripts", "restarts", "heard"),
    [
        ([[DEATH]], 3, ["Failed"]),
        ([[READY, DEATH]], 0, ["Ready", "Failed"]),
        ([[READY, DEATH], [Failed("--dtype", config=True)]], 3, ["Ready", "Lost", "Failed"]),
    ],
    ids=["never ready", "no restarts", "a configuration that cannot work"],
)
def test_some_deaths_are_final(
    pauses: list[float], scripts: list[list[Heard]], restarts: int, heard: list[str]
) -> None:
    supervised = Supervised(*scripts, restarts=restarts)
    assert asyncio.run(supervised.run()) == heard
    assert supervised.heard[-1] == scripts[-1][-1]


def test_an_engine_that_ends_because_it_was_told_to_is_not_replaced(pauses: list[float]) -> None:
    supervised = Supervised([READY], [READY], restarts=3)

    async def run() -> None:
        await supervised.run()
        await supervised.link.stop()

    asyncio.run(run())
    assert [type(message).__name__ for message in supervised.heard] == ["Ready", "Failed"]
    assert not supervised.links[1].config.record and not pauses


def test_deaths_long_ago_do_not_count(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "WINDOW_SECONDS", 0.0)
    supervised = Supervised(*[[READY, DEATH]] * 4, [READY], restarts=1)
    assert asyncio.run(supervised.run())[-1] == "Ready"
    assert pauses == [0.0] * 4


def test_the_next_engine_gets_what_is_sent_and_a_recording_of_its_own(pauses: list[float]) -> None:
    supervised = Supervised([READY, DEATH], [READY], restarts=1)

    async def run() -> None:
        await supervised.run(EngineConfig(record="calls"))
        supervised.link.send(Abort(7))
        await supervised.link.stop()

    asyncio.run(run())
    first, second = supervised.links
    assert (first.sent, second.sent) == ([], [Abort(7)])
    assert (first.config.record, second.config.record) == ("calls", "calls.1")
    assert second.stopped


def test_a_stop_ends_a_restart_that_waits() -> None:
    async def run() -> None:
        supervised = Supervised([READY, DEATH], [READY, DEATH], [READY], restarts=2)
        await supervised.run()
        assert isinstance(supervised.heard[-1], Lost)  # the second pause is a second
        await supervised.link.stop()
        assert isinstance(supervised.heard[-1], Lost)
        assert not any(isinstance(message, Ready) for message in supervised.heard[3:])

    asyncio.run(run())


def test_an_engine_that_falls_silent_is_killed_and_replaced_and_one_that_speaks_is_not() -> None:
    async def run() -> None:
        supervised = Supervised([READY], [READY], restarts=1, silence=0.2)
        await supervised.run()
        first, second = supervised.links
        for _ in range(20):
            await asyncio.sleep(0.02)
            first.receive(Heartbeat(None))
        assert not first.killed
        async with asyncio.timeout(30):
            while not second.says or supervised.heard[-1] is not READY or not first.killed:
                await asyncio.sleep(0.01)
        kinds = [type(message).__name__ for message in supervised.heard if not isinstance(message, Heartbeat)]
        assert kinds == ["Ready", "Lost", "Ready"]
        await supervised.link.stop()

    asyncio.run(run())


def test_a_stopped_engine_process_is_replaced(tmp_path: Path) -> None:
    toy_llama(tmp_path)
    config = EngineConfig(model=str(tmp_path), dtype="float32", block_size=16, num_threads=1)
    made: list[ProcessLink] = []

    def make() -> ProcessLink:
        made.append(ProcessLink(log_level="critical"))
        return made[-1]

    async def run() -> None:
        async with AsyncEngine(config, link=SupervisedLink(make, restarts=1, silence=3.0)) as engine:
            pid = made[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            async with asyncio.timeout(90):
                while engine.health().restarts == 0:
                    await asyncio.sleep(0.05)
            short = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
            assert len([output async for output in engine.generate([1, 2], short)]) == 3
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    asyncio.run(run())


def test_a_killed_engine_process_is_replaced_and_serves_the_same_tokens(tmp_path: Path) -> None:
    toy_llama(tmp_path)
    config = EngineConfig(model=str(tmp_path), dtype="float32", block_size=16, num_threads=1)
    short = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    made: list[ProcessLink] = []

    def make() -> ProcessLink:
        made.append(ProcessLink(log_level="critical"))
        return made[-1]

    async def tokens(engine: AsyncEngine) -> list[int]:
        return [token async for output in engine.generate([1, 2, 3], short) for token in output.token_ids]

    async def run() -> None:
        async with AsyncEngine(config, link=SupervisedLink(make, restarts=1)) as engine:
            before = await tokens(engine)
            stream = await engine.submit([4, 5], SamplingParams(max_tokens=900, ignore_eos=True))
            await anext(stream)
            pid = made[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(Unavailable):
                async for _ in stream:
                    pass
            assert engine.health().state == "restarting"
            assert engine.stats().running == 0
            with pytest.raises(Unavailable, match="restarted"):
                await engine.submit([1], short)
            async with asyncio.timeout(60):
                while engine.health().state != "ready":
                    await asyncio.sleep(0.05)
            assert engine.health().restarts == 1 and made[1].pid != pid
            assert await tokens(engine) == before

    asyncio.run(run())
