"""A request's grammar on its way to the engine: judged in a process of the front end, then taught to the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from tokenspeed.engine.messages import Learn, Learnt
from tokenspeed.engine.questions import Questions
from tokenspeed.errors import InvalidRequest, QueueFull, RequestError
from tokenspeed.request import Grammar
from tokenspeed.text.grammars.compiler import GrammarCompiler
from tokenspeed.text.grammars.vocabulary import Vocabulary


class GrammarIntake:
    """`send` reaches the engine, and raises where none would answer; `vocabulary` makes what grammars are compiled for,
    when the first one comes."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], send: Callable[[Learn], None]) -> None:
        self._compiler = GrammarCompiler(vocabulary)
        self._send = send
        self._questions: Questions[Learnt] = Questions()

    async def take(self, grammar: Grammar | None, tenant: bytes) -> bytes:
        """The name of a grammar that the engine holds, empty for none. Raises a `RequestError` for what is no grammar.

        The engine may have dropped it, or be another one than before: so it is asked each time, and taught if need be.
        """
        if grammar is None:
            return b""
        rules = await self._compiler.compile(grammar, tenant)
        answer = await self._ask(rules.key)
        if not answer.held and not answer.error:
            vocabulary = await self._compiler.vocabulary() if answer.lacks_vocabulary else None
            answer = await self._ask(rules.key, rules.rules, vocabulary)
        if answer.full:
            raise QueueFull("grammars of running requests leave no room for another; try again later", retry_after=1)
        if not answer.held:
            raise InvalidRequest(f"{grammar.field}: {answer.error}", param=grammar.field)
        return rules.key

    async def take_for(self, grammar: Grammar | None, tenant: bytes, over: asyncio.Future[None]) -> bytes | None:
        """The same for a request that is `over` as soon as that is done: None then, at once, or what it was set to
        raise. Whoever else waits for the same grammar does not notice."""
        if grammar is None:
            return b""
        taking = asyncio.create_task(self.take(grammar, tenant))
        taking.add_done_callback(lambda task: task.cancelled() or task.exception())  # may come when nobody waits
        either: set[asyncio.Future[Any]] = {taking, over}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            return over.result() if over.done() else taking.result()
        finally:
            taking.cancel()

    def learnt(self, answer: Learnt) -> None:
        """The engine's answer."""
        self._questions.answer(answer.id, answer)

    def fail(self, error: RequestError) -> None:
        """The engine is over: nobody is left waiting for its answer."""
        self._questions.fail(error)

    async def close(self) -> None:
        """End the processes that judge."""
        await self._compiler.close()

    async def _ask(self, key: bytes, rules: str = "", vocabulary: Vocabulary | None = None) -> Learnt:
        return await self._questions.ask(lambda id: self._send(Learn(id, key, rules, vocabulary)))
