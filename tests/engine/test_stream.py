"""A stream read by `each`: outputs are handed over in the call that brings them, and wait while there is no room."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.engine.test_lane import BOUNDS, Transport
from tests.toy import write_tokenizer
from tokenspeed.batch import Finish
from tokenspeed.checkpoint.source import Source
from tokenspeed.engine.lane import Frame, Gaps, Outlet, Pieces, Way, carry
from tokenspeed.engine.messages import ChoiceTokens
from tokenspeed.engine.stream import Stream, new_choice
from tokenspeed.errors import Unavailable
from tokenspeed.request import RequestOutput, SamplingParams
from tokenspeed.text.load import load_text
from tokenspeed.text.tokenizer import Tokenizer

A, B, C = 68, 69, 70


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("toy")
    write_tokenizer(folder)
    return load_text(Source("hf", folder, "toy")).tokenizer


@dataclass
class Reader:
    """What takes outputs: after `limit` of them it is full until `emptied`."""

    limit: int = 1000
    taken: list[int] = field(default_factory=list)
    emptied: asyncio.Event = field(default_factory=asyncio.Event)
    reasons: list[str | None] = field(default_factory=list)

    def take(self, output: RequestOutput) -> bool:
        self.taken += output.token_ids
        self.reasons.append(output.finish_reason)
        return len(self.taken) == self.limit

    async def room(self) -> None:
        await self.emptied.wait()


class World:
    """A stream of `n` choices with a place of the engine's that remembers what it was told."""

    def __init__(self, tokenizer: Tokenizer, n: int = 1) -> None:
        params = SamplingParams(max_tokens=9, n=n)
        self.choices = [new_choice(id, id, tokenizer, params, frozenset(), None) for id in range(n)]
        self.aborted: list[int] = []
        self.ended = 0
        self.stream = Stream(
            "r", [1], self.choices, abort_choice=self.aborted.append, finish_choice=lambda *_: None, on_end=self._over
        )

    def _over(self, _: Stream) -> None:
        self.ended += 1

    def feed(self, *token_ids: int, choice: int = 0, finish: int = 0) -> None:
        self.stream.feed(self.choices[choice], ChoiceTokens(choice, list(token_ids), finish))

    async def reading(self, take: Callable[[RequestOutput], bool], room: Callable[[], Awaitable[None]]) -> Any:
        task = asyncio.create_task(self.stream.each(take, room))
        await asyncio.sleep(0)
        return task


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def test_outputs_are_taken_in_the_call_that_brings_them(tokenizer: Tokenizer) -> None:
    async def work() -> None:
        world, reader = World(tokenizer), Reader()
        world.feed(A)
        task = await world.reading(reader.take, reader.room)
        assert reader.taken == [A]
        world.feed(B)
        assert reader.taken == [A, B]
        world.feed(C, finish=Finish.LENGTH)
        await asyncio.wait_for(task, 5)
        assert (reader.taken, reader.reasons, world.ended) == ([A, B, C], [None, None, "length"], 1)
        assert world.stream.generated() == [A, B, C] and not world.aborted

    run(work())


def test_while_there_is_no_room_outputs_wait_in_their_order(tokenizer: Tokenizer) -> None:
    async def work() -> None:
        world, reader = World(tokenizer), Reader(limit=1)
        task = await world.reading(reader.take, reader.room)
        world.feed(A)
        world.feed(B)
        await asyncio.sleep(0)
        world.feed(C, finish=Finish.LENGTH)
        await asyncio.sleep(0)
        assert reader.taken == [A] and not task.done()
        reader.emptied.set()
        await asyncio.wait_for(task, 5)
        assert reader.taken == [A, B, C]

    run(work())


def test_what_the_reader_raises_is_raised_where_it_waits_and_no_more_is_taken(tokenizer: Tokenizer) -> None:
    async def work() -> None:
        taken: list[int] = []

        def take(output: RequestOutput) -> bool:
            taken.extend(output.token_ids)
            raise ConnectionResetError("gone")

        world = World(tokenizer)
        task = await world.reading(take, Reader().room)
        world.feed(A)
        world.feed(B)
        with pytest.raises(ConnectionResetError):
            await task
        assert taken == [A]
        await world.stream.abort()
        assert world.aborted == [0]

    run(work())


def test_cancelling_the_reader_aborts_the_request(tokenizer: Tokenizer) -> None:
    async def work() -> None:
        world, reader = World(tokenizer, n=2), Reader()
        task = await world.reading(reader.take, reader.room)
        world.feed(A, choice=1, finish=Finish.STOP)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (world.aborted, world.ended, reader.taken) == ([0], 1, [A])

    run(work())


def test_an_engine_that_is_gone_ends_the_reading_with_its_error(tokenizer: Tokenizer) -> None:
    async def work() -> None:
        world, reader = World(tokenizer), Reader()
        task = await world.reading(reader.take, reader.room)
        world.feed(A)
        world.stream.fail(Unavailable("gone", retry_after=1))
        with pytest.raises(Unavailable):
            await task
        assert reader.taken == [A]

    run(work())


def test_an_abort_from_elsewhere_is_the_last_output_of_every_choice(tokenizer: Tokenizer) -> None:
    async def work() -> None:
        world, reader = World(tokenizer, n=2), Reader()
        task = await world.reading(reader.take, reader.room)
        await world.stream.abort()
        await asyncio.wait_for(task, 5)
        assert reader.reasons == ["abort", "abort"]

    run(work())


def test_every_single_token_has_its_text_whatever_stands_before(tokenizer: Tokenizer) -> None:
    texts = {id: tokenizer.texts[id] for id in range(tokenizer.vocab_size)}
    assert texts[A] == tokenizer.decode([A])
    assert None in texts.values()
    assert all(text is None or text.encode() == tokenizer.token_bytes(id) for id, text in texts.items())


class Failing:
    """A `Direct` that cannot take in what went straight."""

    outlet = Outlet(Transport(), False, 10_000)
    gaps = Gaps(BOUNDS)

    def way(self, index: int) -> tuple[Way, float, int]:
        return Way(Frame(b"<", b">"), "", False), 0.0, 0

    def passed(self, index: int, text: str, num_tokens: int, num_events: int, last: float) -> None:
        raise ZeroDivisionError


def test_a_stream_whose_answer_breaks_over_what_went_straight_still_ends(tokenizer: Tokenizer) -> None:
    async def work() -> None:
        world, reader = World(tokenizer, n=2), Reader()
        pieces = Pieces(tokenizer.table, tokenizer.special_ids, tokenizer.vocab_size)
        params = SamplingParams(max_tokens=9, n=2)
        world.choices[:] = [new_choice(id, id, tokenizer, params, frozenset(), None, pieces) for id in range(2)]
        reading = asyncio.create_task(world.stream.each(reader.take, reader.room, Failing()))
        await asyncio.sleep(0)
        lanes = {choice.id: choice.lane for choice in world.choices if choice.lane is not None}
        for id in lanes:
            world.feed(A, choice=id)
            assert not carry([ChoiceTokens(id, [B])], lanes, 1.0, lambda item: None)
        await world.stream.abort()
        assert (world.aborted, world.ended) == ([0, 1], 1)
        with pytest.raises(ZeroDivisionError):
            await reading

    run(work())
