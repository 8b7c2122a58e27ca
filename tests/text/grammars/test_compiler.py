"""The processes that judge grammars: what kills one is refused, and whoever comes next is served."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.text.grammars.alphabet import VOCABULARY, compiled
from tokenspeed.engine.grammars import STACK_BYTES
from tokenspeed.errors import InternalError, InvalidRequest, QueueFull, Unavailable
from tokenspeed.request import Grammar, GrammarKind
from tokenspeed.text.grammars import compiler as module
from tokenspeed.text.grammars.compiler import GrammarCompiler

GOOD = Grammar("json_schema", '{"type": "object", "properties": {"a": {"type": "integer"}}}')
SECONDS = 1.0


def judged(work: Callable[[GrammarCompiler], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        compiler = GrammarCompiler(lambda: VOCABULARY, **({"seconds": SECONDS} | settings))
        try:
            await work(compiler)
        finally:
            await compiler.close()

    asyncio.run(run())


def nested(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"oneOf": [{"type": "integer"}, {"type": "object", "properties": {"a": schema}, "required": ["a"]}]}
    return schema


HOSTILE: list[tuple[str, GrammarKind, str]] = [
    ("no JSON", "json_schema", "{"),
    ("deep brackets", "json_schema", "[" * 100_000),
    ("a cycle of references", "json_schema", '{"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}'),
    ("a reference elsewhere", "json_schema", '{"$ref": "https://example.com/schema.json"}'),
    ("an enum of 100,000", "json_schema", json.dumps({"enum": list(range(100_000))})),
    ("too deep", "json_schema", json.dumps(nested(40))),
    ("10,000 properties", "json_schema", json.dumps({"properties": {f"p{at}": {} for at in range(10_000)}})),
    ("an open parenthesis", "regex", "("),
    ("parentheses", "regex", "(" * 50_000 + "a" + ")" * 50_000),
    ("no root", "ebnf", 'start ::= "a"'),
    ("only itself", "ebnf", "root ::= root"),
    ("nothing for ever", "ebnf", 'root ::= (""*)*'),
    ("brackets", "ebnf", "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000),
    ("no texts", "choice", "[]"),
    ("numbers", "choice", "[1]"),
    ("half a character", "regex", "\ud800"),
]


def test_a_hostile_grammar_is_refused_and_the_next_one_compiled() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        for name, kind, text in HOSTILE:
            with pytest.raises(InvalidRequest) as refused:
                await compiler.compile(Grammar(kind, text, "structured_outputs.x"))
            assert refused.value.param == "structured_outputs.x", name
            assert "/" + "project" not in refused.value.message, name
            assert (await compiler.compile(GOOD)).rules, name

    judged(work)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("regex", "(a+)+b"),
        ("json_schema", json.dumps(nested(30))),
        ("ebnf", 'root ::= s\ns ::= s s | "a" | ""'),
        ("json_schema", '{"type": "string", "maxLength": 100000}'),
        ("choice", json.dumps([f"v{index}" for index in range(2000)])),
    ],
)
def test_what_only_looks_hostile_is_compiled(kind: GrammarKind, text: str) -> None:
    async def work(compiler: GrammarCompiler) -> None:
        rules = await compiler.compile(Grammar(kind, text))
        assert rules.rules and len(rules.key) == 16

    judged(work)


def test_a_refusal_is_remembered_and_so_are_rules() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        first = await compiler.compile(GOOD)
        worker = compiler._workers[0]
        await worker.kill()  # nobody is asked again
        compiler._workers.clear()
        assert await compiler.compile(GOOD) == first
        assert not compiler._workers

    judged(work)


def test_the_memory_of_grammars_is_bounded() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        for index in range(12):
            await compiler.compile(Grammar("json_schema", json.dumps({"const": f"{index}" * 50})))
        assert 1 <= len(compiler._verdicts) < 12 and compiler._cached_bytes <= 30_000

    judged(work, cache_bytes=30_000)


def test_a_worker_that_is_killed_is_replaced() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        await compiler.compile(GOOD)
        await compiler._workers[0].kill()
        assert (await compiler.compile(Grammar("regex", "a"))).rules
        working = asyncio.create_task(compiler.compile(Grammar("choice", json.dumps([f"v{at}" for at in range(3000)]))))
        await asyncio.sleep(0.05)
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for pid in children:
            if "grammars.worker" in Path(f"/proc/{pid}/cmdline").read_text():
                os.kill(int(pid), signal.SIGKILL)
        with pytest.raises(InternalError):
            await working
        assert (await compiler.compile(Grammar("regex", "b"))).rules

    judged(work)


def test_equal_grammars_are_compiled_once_and_one_asker_may_leave() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        leaving = asyncio.create_task(compiler.compile(GOOD))
        staying = asyncio.create_task(compiler.compile(GOOD))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert len(compiler._judging) == 1
        leaving.cancel()
        assert (await staying).rules
        assert leaving.cancelled()

    judged(work)


def test_what_nobody_waits_for_is_not_begun() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        grammars = [Grammar("regex", f"x{index}") for index in range(module.WORKERS)]
        busy = [asyncio.create_task(compiler.compile(grammar)) for grammar in grammars]
        waiting = asyncio.create_task(compiler.compile(GOOD))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.gather(*busy)
        await asyncio.gather(*compiler._judging.values())
        assert len(compiler._verdicts) == module.WORKERS

    judged(work)


def test_too_many_that_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)

    async def work(compiler: GrammarCompiler) -> None:
        tasks = [asyncio.create_task(compiler.compile(Grammar("regex", f"x{index}"))) for index in range(3)]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes].count(QueueFull) == 1

    judged(work)


def test_one_tenant_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_OF_ONE", 2)

    async def work(compiler: GrammarCompiler) -> None:
        flood = [compiler.compile(Grammar("regex", f"x{index}"), b"flood") for index in range(3)]
        outcomes = await asyncio.gather(*flood, compiler.compile(GOOD, b"polite"), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes].count(QueueFull) == 1
        assert not isinstance(outcomes[-1], BaseException)
        assert (await compiler.compile(Grammar("regex", "y"), b"flood")).rules and not compiler._waiting

    judged(work)


def test_a_refusal_by_the_clock_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(compiler: GrammarCompiler) -> None:
        with monkeypatch.context() as hurried:
            hurried.setattr(module, "WALL_FACTOR", 0)
            with pytest.raises(InvalidRequest, match="takes more than"):
                await compiler.compile(GOOD)
        with pytest.raises(InvalidRequest, match="takes more than"):  # remembered
            await compiler.compile(GOOD)
        later = time.monotonic() + 2 * module.OVERDUE_SECONDS
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: later))
        assert (await compiler.compile(GOOD)).rules

    judged(work)


def test_at_the_end_nobody_is_left_waiting() -> None:
    async def run() -> None:
        compiler = GrammarCompiler(lambda: VOCABULARY, seconds=SECONDS)
        waiting = asyncio.create_task(compiler.compile(GOOD))
        await asyncio.sleep(0.01)
        await compiler.close()
        with pytest.raises(Unavailable):
            await waiting
        with pytest.raises(Unavailable):  # and no process is started for whoever comes now
            await compiler.compile(Grammar("regex", "a"))

    asyncio.run(run())


def test_whoever_comes_as_an_unwanted_grammar_is_dropped_is_served_all_the_same() -> None:
    async def work(compiler: GrammarCompiler) -> None:
        await compiler.vocabulary()
        async with contextlib.AsyncExitStack() as busy:
            for _ in range(module.WORKERS):
                await busy.enter_async_context(compiler._turns.place(b"busy"))
            leaving = asyncio.create_task(compiler.compile(GOOD))
            await asyncio.sleep(0)
            dropped, = compiler._judging.values()
            leaving.cancel()
            await asyncio.sleep(0)
        while not dropped.done():
            await asyncio.sleep(0)
        assert (await compiler.compile(GOOD)).rules

    judged(work)


def test_a_process_that_judges_has_no_more_stack_than_the_engine_compiles_with() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard != resource.RLIM_INFINITY:
        pytest.skip("the system sets a limit of its own")

    async def work(compiler: GrammarCompiler) -> None:
        await compiler.compile(GOOD)
        limit, _ = resource.prlimit(compiler._workers[0]._process.pid, resource.RLIMIT_STACK)
        assert 0 < limit < STACK_BYTES

    resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
    try:
        judged(work)
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def test_ids_without_a_text_mark_the_end_and_only_where_it_may_be() -> None:
    grammar = compiled({"type": "regex", "pattern": "a+"})
    matcher = grammar.matcher({VOCABULARY.stop_id, ord("z")})
    word, bit = divmod(VOCABULARY.stop_id, 32)
    assert not int(matcher.mask[word]) >> bit & 1
    assert matcher.accept(ord("a")) and int(matcher.mask[word]) >> bit & 1 and not matcher.ended
    endless = grammar.matcher(set())
    assert endless.accept(ord("a")) and not int(endless.mask[word]) >> bit & 1
    assert not endless.accept(ord("b"))
