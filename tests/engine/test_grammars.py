"""Requests with a grammar through the whole engine: a random model writes what it must, alone, batched, preempted."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.toy import toy_llama
from tokenspeed import AsyncEngine, EngineConfig, SamplingParams
from tokenspeed.engine import grammars as engine_side
from tokenspeed.engine import moves
from tokenspeed.engine.messages import Learn, Lost
from tokenspeed.errors import InvalidRequest, QueueFull, Unavailable
from tokenspeed.request import Grammar, RequestOutput
from tokenspeed.text.grammars import compiler as front_side

SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 0, "maximum": 9999},
        "b": {"enum": ["x", "yy"]},
        "c": {"type": "string", "maxLength": 8},
    },
    "required": ["a", "b", "c"],
}
OBJECT = Grammar("json_schema", json.dumps(SCHEMA), "response_format")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    toy_llama(path)
    return path


def config(folder: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(**({"model": str(folder), "dtype": "float32", "block_size": 16, "num_threads": 1} | changes))


def params(grammar: Grammar | None = OBJECT, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 1.0, "max_tokens": 300, "seed": 1, "grammar": grammar} | changes))


async def said(engine: AsyncEngine, asked: SamplingParams) -> list[RequestOutput]:
    """Each choice whole."""
    wholes = [RequestOutput(request_id="", index=index, token_ids=[]) for index in range(asked.n)]
    async for output in engine.generate("hello", asked):
        whole = wholes[output.index]
        whole.text += output.text
        whole.token_ids += output.token_ids
        whole.finish_reason, whole.error = output.finish_reason, output.error
    return wholes


async def text(engine: AsyncEngine, **changes: Any) -> tuple[str, str | None]:
    whole, = await said(engine, params(**changes))
    return whole.text, whole.finish_reason


def check(written: str) -> None:
    value = json.loads(written)
    assert set(value) == {"a", "b", "c"} and 0 <= value["a"] <= 9999
    assert value["b"] in ("x", "yy") and len(value["c"]) <= 8


@pytest.mark.parametrize("overlap", [0, 1])
def test_batched_overlapped_and_alone_a_seed_gives_the_same_valid_text(folder: Path, overlap: int) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder, overlap=overlap), in_process=True) as engine:
            alone = [await text(engine, seed=seed) for seed in range(3)]
            free = await text(engine, grammar=None, ignore_eos=True, max_tokens=60)
            requests = [text(engine, seed=seed) for seed in range(3)]
            requests.append(text(engine, grammar=None, ignore_eos=True, max_tokens=60))
            together = await asyncio.gather(*requests)
            assert together == [*alone, free]
            for written, reason in alone:
                check(written)
                assert reason == "stop"

    asyncio.run(run())


def test_grammars_that_are_followed_in_threads_give_the_same_text(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            expected = [await text(engine, seed=seed) for seed in range(3)]
            monkeypatch.setattr(moves, "AT_ONCE_SECONDS", -1.0)
            assert await asyncio.gather(*(text(engine, seed=seed) for seed in range(3))) == expected

    asyncio.run(run())


def test_a_request_that_is_aborted_while_its_grammar_moves_is_gone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moves, "AT_ONCE_SECONDS", -1.0)
    moving, go_on = threading.Event(), threading.Event()
    move = engine_side.Followed.move

    def slow(row: engine_side.Followed, token: int) -> None:
        moving.set()
        assert go_on.wait(30)
        move(row, token)

    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            await text(engine)
            monkeypatch.setattr(engine_side.Followed, "move", slow)
            hostile = await engine.submit("hello", params(Grammar("regex", "[ab]*"), ignore_eos=True))
            await asyncio.to_thread(moving.wait, 30)
            await hostile.abort()
            assert engine.stats().num_aborts <= 1
            go_on.set()
            check((await text(engine))[0])
            stats = engine.stats()
            assert (stats.running, stats.waiting, stats.num_aborts) == (0, 0, 1)

    asyncio.run(run())


def test_preempted_requests_lose_nothing_of_their_way(folder: Path) -> None:
    async def run() -> None:
        wanted = [{"seed": seed, "grammar": Grammar("regex", "([ab]{3}-){20}c")} for seed in range(6)]
        async with AsyncEngine(config(folder), in_process=True) as engine:
            expected = [await text(engine, **each) for each in wanted]
        small = config(folder, max_num_seqs=6, kv_cache_bytes=14 * 16 * 3 * 2 * 2 * 16 * 4)
        async with AsyncEngine(small, in_process=True) as engine:
            assert await asyncio.gather(*(text(engine, **each) for each in wanted)) == expected
            assert engine.stats().num_preemptions > 0
        for written, reason in expected:
            assert re.fullmatch("([ab]{3}-){20}c", written) and reason == "stop"

    asyncio.run(run())


def test_every_choice_finds_its_own_way(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            choices = await said(engine, params(n=5))
            for choice in choices:
                check(choice.text)
            assert len({choice.text for choice in choices}) == 5

    asyncio.run(run())


KINDS = [
    (Grammar("regex", "[ab]{3,5}"), "[ab]{3,5}"),
    (Grammar("choice", '["yes", "no"]'), "yes|no"),
    (Grammar("ebnf", 'root ::= "(" root ")" | "x"'), r"\(*x\)*"),
    (Grammar("json_schema", '{"type": "object", "maxProperties": 1}'), r"(?s)\{.*\}"),
]


def test_every_kind_of_grammar_binds_greedy_and_drawn(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            for grammar, pattern in KINDS:
                for changes in ({"temperature": 0.0}, {"top_k": 40, "repetition_penalty": 1.2}, {"logprobs": 2}):
                    written, reason = await text(engine, grammar=grammar, max_tokens=80, **changes)
                    assert reason == "length" or re.fullmatch(pattern, written), written

    asyncio.run(run())


def test_the_end_of_a_grammar_ends_a_request_whatever_else_it_asks(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            fixed = Grammar("regex", "abc")
            for changes in ({}, {"ignore_eos": True}, {"min_tokens": 50}, {"stop_token_ids": (66,)}):
                assert await text(engine, grammar=fixed, **changes) == ("abc", "stop")
            open_end = Grammar("regex", "a*")
            written, reason = await text(engine, grammar=open_end, ignore_eos=True, max_tokens=30)
            assert (set(written), reason) == ({"a"}, "length")
            written, reason = await text(engine, grammar=open_end, min_tokens=7, logit_bias={2: 100.0})
            assert reason == "stop" and len(written) >= 6
            assert await text(engine, grammar=Grammar("regex", "ab+c"), stop=("b",)) == ("a", "stop")

    asyncio.run(run())


def test_masks_that_leave_no_token_end_one_request_with_an_error(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            hopeless, neighbour = await asyncio.gather(
                said(engine, params(Grammar("regex", "[ab]+c"), allowed_token_ids=(40, 41))), said(engine, params())
            )
            assert hopeless[0].finish_reason == "error" and "no token was allowed" in (hopeless[0].error or "")
            check(neighbour[0].text)

    asyncio.run(run())


def test_what_is_no_grammar_is_refused_before_anything_comes(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            foo = Grammar("json_schema", '{"type": "foo"}', "field")
            for bad in (Grammar("regex", "("), Grammar("ebnf", "x"), foo):
                with pytest.raises(InvalidRequest) as refused:
                    await engine.submit("hello", params(bad))
                assert refused.value.param == bad.field
            check((await text(engine))[0])

    asyncio.run(run())


def test_leaving_while_a_grammar_is_compiled_leaves_nothing_behind(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            leaving = asyncio.create_task(engine.submit("hello", params(Grammar("regex", "[a-f]{9}"))))
            await asyncio.sleep(0.05)
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            check((await text(engine))[0])
            stats = engine.stats()
            assert (stats.running, stats.waiting) == (0, 0)

    asyncio.run(run())


def test_an_abort_while_a_grammar_is_compiled_ends_the_request_at_once(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            compiler, go_on = engine._grammars._compiler, asyncio.Event()
            judge = compiler._judge

            async def slow(*arguments: Any) -> Any:
                await go_on.wait()
                return await judge(*arguments)

            compiler._judge = slow  # type: ignore[method-assign]
            first = asyncio.create_task(engine.submit("hello", params(n=2), request_id="first"))
            other = asyncio.create_task(text(engine))
            while not compiler._judging:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert await engine.abort("first") is True
            stream = await asyncio.wait_for(first, 30)  # nothing has been compiled yet
            assert [output.finish_reason async for output in stream] == ["abort", "abort"]
            go_on.set()
            check((await other)[0])
            assert engine.stats().num_aborts == 0  # the engine has never heard of it

    asyncio.run(run())


def test_a_grammar_that_the_engine_has_dropped_is_taught_again(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            first = await text(engine)
            held = engine._link._send.__self__._grammars  # type: ignore[attr-defined]
            assert len(held._taught) == 1
            held._taught.clear()
            assert await text(engine) == first and len(held._taught) == 1

    asyncio.run(run())


def test_the_engine_keeps_the_last_used_grammars_within_its_bytes() -> None:
    async def run() -> None:
        from tests.text.grammars.alphabet import COMPILER, VOCABULARY  # noqa: PLC0415 - loads the extension

        rules = [COMPILER.parse({"type": "regex", "pattern": f"{letter}{{1,9}}"}) for letter in "abcdef"]
        one = COMPILER.compile(rules[0]).num_bytes
        held = engine_side.Grammars(cache_bytes=3 * one + one // 2)
        for index, each in enumerate(rules):
            learnt = await held.learn(Learn(index, b"%d" % index, each, VOCABULARY))
            assert learnt.held
            assert (await held.learn(Learn(0, b"0"))).held is (index < 6)
        assert (await held.learn(Learn(9, b"1"))).held is False
        assert (await held.learn(Learn(9, b"5"))).held is True
        with pytest.raises(InvalidRequest):
            held.follow(b"1", set())
        broken = await held.learn(Learn(9, b"x", "{}", VOCABULARY))
        assert not broken.held and broken.error
        held.close()

    asyncio.run(run())


def test_a_grammar_that_takes_too_long_to_follow_ends_its_request_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            check((await text(engine))[0])
            monkeypatch.setattr(engine_side, "USUAL_SECONDS", 0.0)
            monkeypatch.setattr(engine_side, "EXCESS_SECONDS", 0.0)
            whole, = await said(engine, params())
            assert whole.finish_reason == "error" and "too long" in (whole.error or "")
            assert (await text(engine, grammar=None, max_tokens=3, ignore_eos=True))[1] == "length"

    asyncio.run(run())


def test_requests_of_one_grammar_share_the_time_that_it_may_take(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            endless = Grammar("regex", "[ab]*")
            streams = [await engine.submit("hello", params(endless, ignore_eos=True, max_tokens=400)) for _ in "123"]
            taught, = engine._link._send.__self__._grammars._taught.values()  # type: ignore[attr-defined]
            taught.took(2 * engine_side.EXCESS_SECONDS)
            for stream in streams:
                assert [output.finish_reason async for output in stream][-1] == "error"
            with pytest.raises(InvalidRequest, match="too long") as refused:
                await engine.submit("hello", params(endless))
            assert refused.value.param == endless.field
            check((await text(engine))[0])

    asyncio.run(run())


def test_a_grammar_that_cannot_be_followed_is_refused_and_harms_nobody(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            first = await text(engine)
            from tokenspeed.text.grammars.binding import Matcher  # noqa: PLC0415 - loads the extension

            def refuse(matcher: Matcher) -> None:
                raise RuntimeError("no")

            with monkeypatch.context() as failing:
                failing.setattr(Matcher, "_look", refuse)
                with pytest.raises(InvalidRequest, match="cannot be followed: no"):
                    await engine.submit("hello", params())
            assert await text(engine) == first

    asyncio.run(run())


def test_a_grammar_of_cheap_tokens_earns_the_time_of_a_dear_one() -> None:
    taught = engine_side.Taught(None)  # type: ignore[arg-type]
    for _ in range(1000):
        taught.took(engine_side.EXCESS_SECONDS)
        for _ in range(int(engine_side.EXCESS_SECONDS / engine_side.USUAL_SECONDS)):
            taught.took(0.0)
        assert not taught.too_slow
    taught.took(2 * engine_side.EXCESS_SECONDS)
    assert taught.too_slow


def test_grammars_that_requests_still_follow_count_until_these_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        from tests.text.grammars.alphabet import COMPILER, VOCABULARY  # noqa: PLC0415 - loads the extension

        rules = [COMPILER.parse({"type": "regex", "pattern": f"{letter}{{1,9}}"}) for letter in "abcd"]
        one = COMPILER.compile(rules[0]).num_bytes
        monkeypatch.setattr(engine_side, "HELD_BYTES", 3 * one + one // 2)
        held = engine_side.Grammars(cache_bytes=one + one // 2)
        followed = []
        for index, each in enumerate(rules[:3]):
            assert (await held.learn(Learn(index, b"%d" % index, each, VOCABULARY))).held
            followed.append(held.follow(b"%d" % index, set()))
        last = Learn(3, b"3", rules[3], VOCABULARY)
        answer = await held.learn(last)
        assert answer.full and not answer.held
        followed.clear()
        assert (await held.learn(last)).held
        held.close()

    asyncio.run(run())


def test_an_engine_without_room_for_a_grammar_is_asked_again_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            monkeypatch.setattr(engine_side, "HELD_BYTES", 0)
            with pytest.raises(QueueFull) as refused:
                await engine.submit("hello", params())
            assert refused.value.retry_after

    asyncio.run(run())


def test_later_choices_find_their_grammar_though_the_engine_has_dropped_it(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            held = engine._link._send.__self__._grammars  # type: ignore[attr-defined]
            follow = held.follow

            def follow_once(*arguments: Any) -> Any:
                constraint = follow(*arguments)
                held._taught.clear()
                held.follow = follow
                return constraint

            held.follow = follow_once
            stream = await engine.submit("hello " * 40, params(n=3))
            reasons = [output.finish_reason async for output in stream if output.finish_reason]
            assert reasons == ["stop"] * 3

    asyncio.run(run())


def test_an_engine_that_dies_while_a_grammar_is_judged_leaves_nobody_waiting(folder: Path) -> None:
    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            submitting = asyncio.create_task(engine.submit("hello", params()))
            await asyncio.sleep(0.05)
            engine._link._send = lambda message: None  # type: ignore[attr-defined] # nobody hears it any more
            engine._receive(Lost("it broke"))
            with pytest.raises(Unavailable, match="restarted"):
                await asyncio.wait_for(submitting, 60)

    asyncio.run(run())


def test_without_the_package_a_grammar_is_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_side, "find_spec", lambda name: None)

    async def run() -> None:
        async with AsyncEngine(config(folder), in_process=True) as engine:
            with pytest.raises(InvalidRequest, match="xgrammar") as refused:
                await engine.submit("hello", params())
            assert refused.value.param == "response_format"

    asyncio.run(run())
