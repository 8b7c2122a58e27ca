"""A request's grammar on its way to the engine: judged in a process of the front end, then taught to the engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from tokenspeed.engine.messages import Learn, Learnt
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
        self._asked: dict[int, asyncio.Future[Learnt]] = {}
        self._numbers = itertools.count()

    async def take(self, grammar: Grammar | None) -> bytes:
        """The name of a grammar that the engine holds, empty for none. Raises a `RequestError` for what is no grammar.

        The engine may have dropped it, or be another one than before: so it is asked each time, and taught if need be.
        """
        if grammar is None:
            return b""
        rules = await self._compiler.compile(grammar)
        answer = await self._ask(rules.key)
        if not answer.held and not answer.error:
            vocabulary = await self._compiler.vocabulary() if answer.lacks_vocabulary else None
            answer = await self._ask(rules.key, rules.rules, vocabulary)
        if answer.full:
            raise QueueFull("grammars of running requests leave no room for another; try again later", retry_after=1)
        if not answer.held:
            raise InvalidRequest(f"{grammar.field}: {answer.error}", param=grammar.field)
        return rules.key

    def learnt(self, answer: Learnt) -> None:
        """The engine's answer."""
        future = self._asked.get(answer.id)
        if future is not None and not future.done():
            future.set_result(answer)

    def fail(self, error: RequestError) -> None:
        """The engine is over: nobody is left waiting for its answer."""
        for future in self._asked.values():
            if not future.done():
                future.set_exception(error)

    async def close(self) -> None:
        """End the processes that judge."""
        await self._compiler.close()

    async def _ask(self, key: bytes, rules: str = "", vocabulary: Vocabulary | None = None) -> Learnt:
        id = next(self._numbers)
        self._asked[id] = asyncio.get_running_loop().create_future()
        try:
            self._send(Learn(id, key, rules, vocabulary))
            return await self._asked[id]
        finally:
            del self._asked[id]
