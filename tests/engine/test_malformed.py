"""Malformed messages over the engine's socket: each is answered for itself, and nobody else notices."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tests.engine.test_step_loop import Bench
from tests.toy import VOCAB_SIZE, toy_llama
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams
from tokenspeed._core import Refusal, Scheduler
from tokenspeed.batch import Int32Array
from tokenspeed.engine.link import ProcessLink, Receive
from tokenspeed.engine.messages import Abort, Accepted, FinishAt, FromEngine, Refused, Submit
from tokenspeed.engine.service import _submitted

CANARY = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
TEXT = np.arange(5, 20, dtype="<i4").tobytes()


def params(**fields: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(fields))


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"id": 2**63}, "request_id"),
    ({"id": 2**64 - 1}, "request_id"),
    ({"prompt": TEXT[:-1]}, "cut off"),
    ({"prompt": np.array([5, VOCAB_SIZE], "<i4").tobytes()}, "token id"),
    ({"priority": 2**31}, "priority"),
    ({"priority": -(2**31) - 1}, "priority"),
    ({"session": -1}, "session"),
    ({"session": 2**63}, "session"),
    ({"tps_floor": math.nan}, "tps_floor"),
    ({"tps_floor": math.inf}, "tps_floor"),
    ({"tps_floor": -1.0}, "tps_floor"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"params": params(min_tokens=2**31)}, "min_tokens"),
    ({"params": params(temperature=math.nan)}, "temperature"),
    ({"params": params(unknown=1)}, "unknown"),
    ({"params": msgspec.Raw(b"\x81\xa4stop\x91\xa1\xff")}, "utf-8"),
]
"""What differs from a submission that is right, and a word of the answer."""


class Tap(ProcessLink):
    """Keeps the refusals that pass."""

    def __init__(self) -> None:
        super().__init__(log_level="critical")
        self.refused: dict[int, Refused] = {}

    async def start(self, config: EngineConfig, receive: Receive) -> None:
        def tapped(message: FromEngine) -> None:
            if isinstance(message, Refused):
                self.refused[message.id] = message
            receive(message)

        await super().start(config, tapped)


def test_a_malformed_message_is_answered_for_itself_and_nobody_else_notices(tmp_path: Path) -> None:
    toy_llama(tmp_path)
    link = Tap()
    config = EngineConfig(model=str(tmp_path), dtype="float32", block_size=16, num_threads=1)

    async def canary(engine: AsyncEngine) -> list[int]:
        return [token async for output in engine.generate([5, 6, 7], CANARY) for token in output.token_ids]

    async def run() -> None:
        async with AsyncEngine(config, link=link) as engine:
            alone = await canary(engine)
            beside = asyncio.create_task(canary(engine))
            answers = {}
            for number, (changes, word) in enumerate(MALFORMED, start=1000):
                right: dict[str, Any] = {"id": number, "prompt": TEXT, "params": params(max_tokens=3), "seed": 1}
                message = Submit(**(right | changes))
                answers[message.id] = word
                link.send(message)
                await asyncio.sleep(0)
            for end in (Abort(2**63), FinishAt(2**63, 1), FinishAt(1, -1), FinishAt(2**40, -1), Abort(-(2**63))):
                link.send(end)
            assert await beside == alone == await canary(engine)
            assert {id: refused.reason for id, refused in link.refused.items()} == dict.fromkeys(answers, "INVALID")
            for id, word in answers.items():
                assert word in link.refused[id].detail, link.refused[id]
            assert engine.stats().blocks_used == engine.stats().waiting == 0

    asyncio.run(run())


def test_a_submission_for_which_there_is_no_memory_is_refused_like_one_too_many() -> None:
    class Starved(Scheduler):
        """Has no memory for a long prompt."""

        def submit(self, request_id: int, prompt: Int32Array, **wishes: Any) -> Refusal | None:
            if len(prompt) > 10:
                raise MemoryError
            return super().submit(request_id, prompt, **wishes)

    bench = Bench(1, kind=Starved)
    long, short = (
        Submit(id=length, prompt=TEXT[: 4 * length], params=params(max_tokens=3), seed=1) for length in (15, 5)
    )
    refused = _submitted(bench.loop, long)
    assert isinstance(refused, Refused) and refused.reason == "QUEUE_FULL" and refused.retry_after >= 0
    assert _submitted(bench.loop, short) == Accepted(5)
