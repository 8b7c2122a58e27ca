"""Grammars judged in processes of their own, which are killed when one takes too long: the front end's side."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import signal
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from importlib.util import find_spec

import msgspec

from tokenspeed.errors import InternalError, InvalidRequest, QueueFull, Unavailable
from tokenspeed.request import Grammar
from tokenspeed.text.grammars.turns import Turns
from tokenspeed.text.grammars.vocabulary import Vocabulary
from tokenspeed.text.grammars.worker import Verdict

log = logging.getLogger(__name__)

COMPILE_SECONDS = 2.0
"""Processor time for one grammar. 100 tools over 131,072 tokens take 0.8 s."""

WALL_FACTOR = 8
"""On a busy machine the clock may run this much faster than the processor's."""

MEMORY_BYTES = 2 << 30
CACHE_BYTES = 64 << 20
MAX_WAITING = 64
MAX_OF_ONE = 48
"""Of these, of one tenant: the others find room, and a worker as soon as it is their turn."""

WORKERS = 2
"""A grammar that takes all its time holds up one of them."""

OVERDUE_SECONDS = 60.0
"""How long it is remembered that a grammar took too long by the clock, which may have been the machine's fault."""

_VERDICT = msgspec.msgpack.Decoder(Verdict)


class Rules(msgspec.Struct, frozen=True):
    """A grammar that can be compiled and followed: its rules, and a name for them."""

    key: bytes
    rules: str


class GrammarCompiler:
    """Turns grammars into rules that the engine compiles without danger. Remembers them, and refusals too.

    `vocabulary` is made once, in a worker thread, when the first grammar comes.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        *,
        seconds: float = COMPILE_SECONDS,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self._make_vocabulary = vocabulary
        self._vocabulary: asyncio.Task[Vocabulary] | None = None
        self._seconds = seconds
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0
        self._verdicts: OrderedDict[bytes, tuple[Verdict, float]] = OrderedDict()  # and until when it holds
        self._judging: dict[bytes, asyncio.Task[Verdict]] = {}
        self._wanted: dict[bytes, int] = {}
        self._workers: list[_Worker] = []
        self._turns = Turns(WORKERS)
        self._waiting: Counter[bytes] = Counter()
        self._closed = False

    async def vocabulary(self) -> Vocabulary:
        """The vocabulary of all grammars, as the engine needs it too."""
        if self._vocabulary is None:
            self._vocabulary = asyncio.create_task(asyncio.to_thread(self._make_vocabulary))
        return await asyncio.shield(self._vocabulary)

    async def compile(self, grammar: Grammar, tenant: bytes = b"") -> Rules:
        """`InvalidRequest` names the grammar's field, `QueueFull` where too many wait, `Unavailable` after `close`.

        Tenants take turns.
        """
        if find_spec("xgrammar") is None:
            raise InvalidRequest(f"{grammar.field} needs the package xgrammar on this server", param=grammar.field)
        try:
            how = f"{grammar.kind}\0{grammar.strict}\0{grammar.thinking}\0{grammar.marks}"
            asked = f"{how}\0{grammar.text}".encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{grammar.field} is no valid Unicode", param=grammar.field) from None
        verdict = await self._verdict(hashlib.blake2b(asked, digest_size=16).digest(), grammar, tenant)
        if verdict.refusal:
            raise InvalidRequest(f"{grammar.field}: {verdict.refusal}", param=grammar.field)
        return Rules(hashlib.blake2b(verdict.rules.encode(), digest_size=16).digest(), verdict.rules)

    async def close(self) -> None:
        """End the processes; whoever waits, or comes later, gets an error."""
        self._closed = True
        judging = list(self._judging.values())
        for task in judging:
            task.cancel()
        await asyncio.gather(*judging, return_exceptions=True)
        workers, self._workers = self._workers, []
        for worker in workers:
            await worker.kill()

    async def _verdict(self, key: bytes, grammar: Grammar, tenant: bytes) -> Verdict:
        known, until = self._verdicts.get(key, (None, math.inf))
        if known is not None and time.monotonic() < until:
            self._verdicts.move_to_end(key)
            return known
        task = self._judging.get(key)
        if task is None or task.done():
            if self._closed:
                raise _closing()
            if len(self._judging) >= MAX_WAITING or self._waiting[tenant] >= MAX_OF_ONE:
                raise QueueFull("too many grammars wait to be compiled; try again later", retry_after=1)
            task = self._judging[key] = asyncio.create_task(self._judge(key, grammar, tenant))
            self._waiting[tenant] += 1
            task.add_done_callback(lambda task: self._judged(key, tenant, task))
        self._wanted[key] = self._wanted.get(key, 0) + 1
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise _closing() from None
            raise
        finally:
            self._wanted[key] -= 1
            if not self._wanted[key]:
                del self._wanted[key]

    def _judged(self, key: bytes, tenant: bytes, task: asyncio.Task[Verdict]) -> None:
        if self._judging.get(key) is task:
            del self._judging[key]
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]

    async def _judge(self, key: bytes, grammar: Grammar, tenant: bytes) -> Verdict:
        vocabulary = await self.vocabulary()
        async with self._turns.place(tenant):
            if key not in self._wanted:
                return Verdict(refusal="nobody waits for it any more")
            worker = await self._worker(vocabulary)
            verdict = await worker.judge(grammar)
            if worker.alive:
                self._workers.append(worker)
        self._remember(key, verdict, time.monotonic() + OVERDUE_SECONDS if worker.overdue else math.inf)
        return verdict

    async def _worker(self, vocabulary: Vocabulary) -> _Worker:
        """One that waits for work, or a new one: the system may have ended those that waited."""
        while self._workers:
            worker = self._workers.pop()
            if worker.alive:
                return worker
        return await _Worker.start(vocabulary, self._seconds)

    def _remember(self, key: bytes, verdict: Verdict, until: float) -> None:
        old = self._verdicts.pop(key, None)
        self._cached_bytes += _size(verdict) - (0 if old is None else _size(old[0]))
        self._verdicts[key] = verdict, until
        while self._cached_bytes > self._cache_bytes:
            self._cached_bytes -= _size(self._verdicts.popitem(last=False)[1][0])


class _Worker:
    """One process of `worker`. It is used for one grammar at a time."""

    def __init__(self, process: asyncio.subprocess.Process, seconds: float) -> None:
        self._process = process
        self._seconds = seconds
        self.overdue = False
        """Whether it was ended because the clock ran out, not its processor time."""

    @property
    def alive(self) -> bool:
        """Whether it can take another grammar."""
        return self._process.returncode is None

    @classmethod
    async def start(cls, vocabulary: Vocabulary, seconds: float) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tokenspeed.text.grammars.worker", str(seconds), str(MEMORY_BYTES),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        worker = cls(process, seconds)
        worker._send(vocabulary)
        return worker

    async def judge(self, grammar: Grammar) -> Verdict:
        """The verdict; one that the process does not live to tell is a refusal."""
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(WALL_FACTOR * self._seconds):
                self._send(grammar)
                size = int.from_bytes(await self._process.stdout.readexactly(4), "little")
                return _VERDICT.decode(await self._process.stdout.readexactly(size))
        except TimeoutError:
            self.overdue = True
            await self.kill()
            return self._too_slow()
        except (ConnectionError, asyncio.IncompleteReadError):
            return await self._died()
        except asyncio.CancelledError:
            await self.kill()
            raise

    async def kill(self) -> None:
        """End it now."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def _died(self) -> Verdict:
        """What it means for the grammar that it ended its process. Raises `InternalError` where it means nothing."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), 1.0)
        code = self._process.returncode
        await self.kill()
        log.warning("a grammar ended the process that compiles it (status %s)", code)
        if code == -signal.SIGPROF:
            return self._too_slow()
        if code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS):
            return Verdict(refusal="takes too much memory to compile")
        raise InternalError("the server could not compile the grammar")

    def _too_slow(self) -> Verdict:
        return Verdict(refusal=f"takes more than {self._seconds:g} s to compile")

    def _send(self, message: msgspec.Struct) -> None:
        assert self._process.stdin is not None
        body = msgspec.msgpack.encode(message)
        self._process.stdin.write(len(body).to_bytes(4, "little") + body)


def _closing() -> Unavailable:
    return Unavailable("the server is shutting down", retry_after=1)


def _size(verdict: Verdict) -> int:
    return len(verdict.rules) + len(verdict.refusal) + 256
