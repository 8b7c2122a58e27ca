"""Grammars in the engine process: compiled ones, and how far each request has come in its own.

A grammar arrives as rules that a process of the front end has compiled before: compiling them once more ends, and
harms nobody. It happens in a thread that holds no interpreter lock meanwhile, so steps go on. What only grammars need
is loaded when the first one comes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from tokenspeed.batch import Finish, Int32Array
from tokenspeed.engine.messages import Learn, Learnt
from tokenspeed.errors import InvalidRequest

if TYPE_CHECKING:
    from tokenspeed.text.grammars.binding import Compiled, Compiler, Matcher
    from tokenspeed.text.grammars.vocabulary import Vocabulary

log = logging.getLogger(__name__)

CACHE_BYTES = 256 << 20
HELD_BYTES = 1 << 30
"""Of compiled grammars in the cache and of those that requests still follow: no more are compiled above that."""

STACK_BYTES = 64 << 20
"""More than the process has that compiled the grammar first: what did not end that one does not end this."""

USUAL_SECONDS = 0.001
EXCESS_SECONDS = 0.5
"""Processor time a token that a grammar may take, and how far all its requests together may get beyond that before
they are ended: every other request of a step waits for them. 100 tools over 49,152 tokens take 0.06 ms a token."""

TOO_SLOW = "takes too long to follow"

MEASURED_EVERY = 128
"""Tokens after which it is measured again what a request's way through its grammar takes. A copy tells, of 40 µs for
what usual ones take and of 0.5 ms a MiB."""

FOLLOWED_BYTES = 64 << 20
"""Of one request's way: grammars that a text matches in many ways take up to 30 KB a token, others 0.1 to 1."""

TOO_LARGE = f"takes more than {FOLLOWED_BYTES >> 20} MiB to follow"


class Constraint(Protocol):
    """What a request's grammar says while tokens come. `error` tells why one was ended by it.

    `mask` [V / 32] int32 has a bit for each token that may come next, None for all; it changes only in `move`.
    `seconds` is what a move is expected to take.
    """

    masked: bool
    error: str | None

    @property
    def mask(self) -> Int32Array | None: ...

    @property
    def seconds(self) -> float: ...

    def move(self, token: int) -> None:
        """Go on with a token that does not end the request. In any thread; `settle` follows in the loop's."""
        ...

    def settle(self, finish: int) -> int:
        """How what a step committed leaves the request, a `Finish`; a constraint may end one that goes on.

        `finish` is how the control plane leaves it.
        """
        ...


class Unconstrained:
    """Of a request without a grammar: any token may come."""

    masked = False
    error: str | None = None
    mask = None
    seconds = 0.0

    def move(self, token: int) -> None:
        pass

    def settle(self, finish: int) -> int:
        return finish


FREE = Unconstrained()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Taught:
    """A compiled grammar. Its requests share the time that it may take: one with many choices has it no more often.

    `excess` is how much more than usual they have taken; cheap tokens make up for dear ones. `seconds` is what the next
    token is expected to take: as much as the dearest of late.
    """

    compiled: Compiled
    excess: float = 0.0
    seconds: float = 0.0

    def took(self, seconds: float) -> None:
        """One token took so much processor time."""
        self.excess = max(0.0, self.excess + seconds - USUAL_SECONDS)
        self.seconds = max(seconds, 0.8 * self.seconds)

    @property
    def too_slow(self) -> bool:
        """Whether nobody may follow it any more."""
        return self.excess > EXCESS_SECONDS


class Followed:
    """One request's way through its grammar."""

    masked = True

    def __init__(self, taught: Taught, stop_ids: set[int]) -> None:
        began = time.thread_time()
        self._taught = taught
        self._matcher: Matcher = taught.compiled.matcher(stop_ids)
        self._num_moves = 0
        self._took: float | None = None
        self.error: str | None = None
        taught.took(time.thread_time() - began)

    @property
    def mask(self) -> Int32Array:
        return self._matcher.mask

    @property
    def seconds(self) -> float:
        return self._taught.seconds

    def move(self, token: int) -> None:
        """See `Constraint`. No interpreter lock is held while it takes long."""
        began = time.thread_time()
        self._num_moves += 1
        try:
            if not self._matcher.accept(token):
                self.error = "a token came that the grammar of this request does not allow"
            elif self._num_moves % MEASURED_EVERY == 0 and self._matcher.num_bytes() > FOLLOWED_BYTES:
                self.error = f"the grammar of this request {TOO_LARGE}"
        except ValueError as failure:
            self.error = f"the grammar of this request failed: {failure}"
        self._took = time.thread_time() - began

    def settle(self, finish: int) -> int:
        """STOP where nothing may follow, ERROR where the token does not belong or the grammar takes too much."""
        if self._took is not None:
            self._taught.took(self._took)
            self._took = None
        if finish != Finish.NONE:
            return finish
        if self.error is None and self._taught.too_slow:
            self.error = f"the grammar of this request {TOO_SLOW}"
        if self.error is not None:
            return Finish.ERROR
        return Finish.STOP if self._matcher.ended else Finish.NONE


class Grammars:
    """The compiled grammars of one engine, by the names of their rules: the last used ones, within `cache_bytes`.

    A grammar that was dropped lives on as long as requests follow it; `HELD_BYTES` bounds those, too.
    """

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._limit = cache_bytes
        self._num_bytes = 0
        self._taught: OrderedDict[bytes, Taught] = OrderedDict()
        self._held: weakref.WeakSet[Taught] = weakref.WeakSet()
        self._compiler: Compiler | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._learning: dict[bytes, asyncio.Future[bool]] = {}

    async def learn(self, message: Learn) -> Learnt:
        """Compile what `message` brings; one that only asks is told whether the grammar is here."""
        key = message.key
        if (taught := self._taught.get(key)) is not None:
            self._taught.move_to_end(key)
            return Learnt(message.id, held=not taught.too_slow, error=TOO_SLOW if taught.too_slow else "")
        if not message.rules:
            return Learnt(message.id, held=False, lacks_vocabulary=self._compiler is None)
        try:
            if key not in self._learning:
                self._learning[key] = asyncio.ensure_future(self._compile(message))
            held = await asyncio.shield(self._learning[key])
        except ValueError as error:
            return Learnt(message.id, held=False, error=str(error))
        finally:
            self._learning.pop(key, None)
        return Learnt(message.id, held=held, full=not held)

    def follow(self, key: bytes, stop_ids: set[int]) -> Constraint:
        """The constraint of a request that follows a grammar; the empty key is none. Raises `InvalidRequest`."""
        if not key:
            return FREE
        taught = self._taught.get(key)
        if taught is None:
            raise InvalidRequest("the grammar is no longer in the engine's cache; send the request again")
        if taught.too_slow:
            raise InvalidRequest(f"the grammar of this request {TOO_SLOW}")
        self._taught.move_to_end(key)
        try:
            return Followed(taught, stop_ids)
        except ValueError as failure:
            raise InvalidRequest(f"the grammar of this request cannot be followed: {failure}") from None

    def close(self) -> None:
        """End the thread once it has compiled what it has begun."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def _compile(self, message: Learn) -> bool:
        """False if there is no room for it beside those that requests follow."""
        loop = asyncio.get_running_loop()
        self._thread = self._thread or _new_thread()
        compiled = await loop.run_in_executor(self._thread, self._compile_now, message.rules, message.vocabulary)
        if sum(taught.compiled.num_bytes for taught in self._held) + compiled.num_bytes > HELD_BYTES:
            return False
        taught = self._taught[message.key] = Taught(compiled)
        self._held.add(taught)
        self._num_bytes += compiled.num_bytes
        while self._num_bytes > self._limit and len(self._taught) > 1:
            self._num_bytes -= self._taught.popitem(last=False)[1].compiled.num_bytes
        return True

    def _compile_now(self, rules: str, vocabulary: Vocabulary | None) -> Compiled:
        from tokenspeed.text.grammars.binding import Compiler  # noqa: PLC0415

        if self._compiler is None:
            if vocabulary is None:
                raise ValueError("a grammar came without a vocabulary")
            self._compiler = Compiler(vocabulary, cache_bytes=self._limit // 2)
        began = time.perf_counter()
        compiled = self._compiler.compile(rules)
        log.debug("compiled a grammar of %d bytes in %.3f s", compiled.num_bytes, time.perf_counter() - began)
        return compiled


def _new_thread() -> ThreadPoolExecutor:
    """One thread with a large stack. The size is the process's setting for the next thread that starts."""
    thread = ThreadPoolExecutor(1, thread_name_prefix="tokenspeed-grammars")
    before = threading.stack_size(STACK_BYTES)
    try:
        thread.submit(lambda: None)
    finally:
        threading.stack_size(before)
    return thread
