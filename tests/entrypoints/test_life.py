"""What the server's flags make of its life."""

from __future__ import annotations

import asyncio

import pytest

from tests.engine.test_supervisor import READY, ScriptedLink
from tokenspeed import EngineConfig
from tokenspeed.entrypoints import life
from tokenspeed.entrypoints.flags import ServerConfig


@pytest.mark.parametrize("silence", [0.2, 0.0])
def test_an_engine_is_given_up_after_the_silence_that_the_flag_says(
    silence: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[ScriptedLink] = []

    def make(**_: str) -> ScriptedLink:
        engines.append(ScriptedLink([READY]))
        return engines[-1]

    monkeypatch.setattr(life, "ProcessLink", make)

    async def scenario() -> None:
        link = life._link(ServerConfig(engine=EngineConfig(), engine_silence=silence))
        await link.start(EngineConfig(), lambda message: None)
        for _ in range(100):
            if engines[0].killed:
                break
            await asyncio.sleep(0.02 if silence else 0.005)
        await link.stop()

    asyncio.run(scenario())
    assert engines[0].killed == (silence > 0)
