"""A stream read in batches: outputs gather for a while, but an end waits for nobody."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable

import pytest

from tests.engine.test_stream import A, B, C, World, run, tokenizer  # noqa: F401  (a fixture)
from tokenspeed.batch import Finish
from tokenspeed.engine.messages import ChoiceTokens
from tokenspeed.engine.stream import Ending, new_choice
from tokenspeed.errors import Unavailable
from tokenspeed.request import RequestOutput, SamplingParams
from tokenspeed.text.stopping import NoText
from tokenspeed.text.tokenizer import Tokenizer

LONG = 600.0


def ids_of(outputs: list[RequestOutput]) -> list[int]:
    return [id for output in outputs for id in output.token_ids]


@pytest.fixture
def world(tokenizer: Tokenizer) -> World:  # noqa: F811
    return World(tokenizer)


async def soon(work: Awaitable[list[RequestOutput]]) -> list[RequestOutput]:
    return await asyncio.wait_for(work, 10)


async def waiting(world: World, pause: float) -> asyncio.Task[list[RequestOutput]]:
    """A reader that has begun to wait."""
    task = asyncio.create_task(world.stream.batch(pause))
    await asyncio.sleep(0)
    assert not task.done()
    return task


def test_without_a_pause_a_batch_is_what_is_there_or_the_next_output(world: World) -> None:
    async def work() -> None:
        world.feed(A)
        world.feed(B)
        assert ids_of(await soon(world.stream.batch())) == [A, B]
        task = await waiting(world, 0.0)
        world.feed(C)
        assert ids_of(await soon(task)) == [C]
        world.feed(A, finish=Finish.LENGTH)
        assert ids_of(await soon(world.stream.batch())) == [A]
        assert await soon(world.stream.batch()) == await soon(world.stream.batch()) == []

    run(work())


def test_outputs_gather_for_the_pause(world: World) -> None:
    async def work() -> None:
        world.feed(A)
        task = await waiting(world, 0.2)
        world.feed(B)
        await asyncio.sleep(0)
        world.feed(C)
        await asyncio.sleep(0)
        assert not task.done()
        assert ids_of(await soon(task)) == [A, B, C]

    run(work())


def test_a_pause_without_an_output_ends_with_the_next_one(world: World) -> None:
    async def work() -> None:
        task = await waiting(world, 0.01)
        await asyncio.sleep(0.05)
        assert not task.done()
        world.feed(A)
        assert ids_of(await soon(task)) == [A]

    run(work())


def test_the_last_token_ends_the_pause_but_one_choice_of_two_does_not(tokenizer: Tokenizer) -> None:  # noqa: F811
    async def work() -> None:
        world = World(tokenizer, n=2)
        task = await waiting(world, LONG)
        world.feed(A, finish=Finish.LENGTH)
        await asyncio.sleep(0.01)
        assert not task.done()
        world.feed(B, choice=1, finish=Finish.STOP)
        assert [output.finish_reason for output in await soon(task)] == ["length", "stop"]
        assert await soon(world.stream.batch(LONG)) == []

    run(work())


def test_an_error_ends_the_pause_and_comes_behind_what_is_there(world: World) -> None:
    async def work() -> None:
        task = await waiting(world, LONG)
        world.feed(A)
        world.stream.fail(Unavailable("gone"))
        assert ids_of(await soon(task)) == [A]
        for pause in (LONG, 0.0):
            with pytest.raises(Unavailable):
                await soon(world.stream.batch(pause))

    run(work())


@pytest.mark.parametrize("pause", [0.0, LONG])
def test_an_error_reaches_who_waits_for_a_first_output(world: World, pause: float) -> None:
    async def work() -> None:
        task = await waiting(world, pause)
        world.stream.fail(Unavailable("gone"))
        with pytest.raises(Unavailable):
            await soon(task)

    run(work())


@pytest.mark.parametrize("pause", [0.0, LONG])
def test_cancelling_the_reader_aborts_the_request(world: World, pause: float) -> None:
    async def work() -> None:
        task = await waiting(world, pause)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (world.aborted, world.ended) == ([0], 1)

    run(work())


def test_an_abort_from_elsewhere_ends_the_pause(world: World) -> None:
    async def work() -> None:
        task = await waiting(world, LONG)
        world.feed(A)
        await world.stream.abort()
        assert [output.finish_reason for output in await soon(task)] == [None, "abort"]
        assert await soon(world.stream.batch()) == []

    run(work())


@pytest.mark.parametrize("seed", range(5))
def test_however_they_gather_all_outputs_come_once_in_their_order(tokenizer: Tokenizer, seed: int) -> None:  # noqa: F811
    async def work() -> None:
        source, world = random.Random(seed), World(tokenizer)
        sent = [source.randrange(3, 500) for _ in range(100)]

        async def feed() -> None:
            for at, id in enumerate(sent):
                world.feed(id, finish=Finish.LENGTH if at == len(sent) - 1 else 0)
                if source.randrange(3) == 0:
                    await asyncio.sleep(source.choice((0, 0, 0.001)))

        feeding = asyncio.create_task(feed())
        read: list[RequestOutput] = []
        while outputs := await soon(world.stream.batch(source.choice((0.0, 0.0005, 0.002)))):
            read += outputs
        await feeding
        assert ids_of(read) == sent
        assert [output.num_output_tokens for output in read] == list(range(1, 101))

    run(work())


@pytest.mark.parametrize(
    ("texts", "stop", "ending", "needed"),
    [(False, (), None, False), (False, ("x",), None, True), (False, (), bool, True), (True, (), None, True)],
)
def test_a_choice_is_detokenized_where_something_needs_its_text(
    tokenizer: Tokenizer, texts: bool, stop: tuple[str, ...], ending: Ending | None, needed: bool  # noqa: F811
) -> None:
    choice = new_choice(0, 0, tokenizer, SamplingParams(stop=stop), frozenset(), ending, texts=texts)
    assert isinstance(choice.text, NoText) != needed


def test_without_text_tokens_are_counted_and_ends_are_the_engines(tokenizer: Tokenizer) -> None:  # noqa: F811
    async def work() -> None:
        world = World(tokenizer)
        world.choices[0] = new_choice(0, 0, tokenizer, SamplingParams(), frozenset({C}), None, texts=False)
        world.feed(A, B)
        world.stream.feed(world.choices[0], ChoiceTokens(0, [C], Finish.STOP, stop_id=C))
        first, second = await soon(world.stream.batch())
        assert (first.text, first.token_ids, first.num_output_tokens) == ("", [A, B], 2)
        assert (second.token_ids, second.num_output_tokens, second.finish_reason) == ([C], 3, "stop")
        assert second.stop_reason is None, "it is the model's own end"

    run(work())
