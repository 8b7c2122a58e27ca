"""The other ranks of a model, as rank 0 knows them: it starts them, or a launcher has, and it notices their end.

A rank that was started here holds one end of a pair of sockets, whose other end is rank 0's alone: it leaves when that
is closed, so no rank outlives rank 0, however that ends. The same socket says what a rank is, and why it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import msgspec

from tokenspeed.config import EngineConfig
from tokenspeed.engine.messages import Failed
from tokenspeed.engine.transport import Channel
from tokenspeed.errors import ConfigError, TokenSpeedError
from tokenspeed.parallel.launched import Place

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOPBACK = "127.0.0.1"

START_SECONDS = 300.0
"""How long ranks that were started here wait for each other: one that dies is noticed at once, a slow one is alive."""

NOTICE_SECONDS = 2.0
"""A collective fails before the death that it fails of is known."""

END_SECONDS = 5.0
"""How long a rank may take to end once there is nothing left to do."""

LOOK_SECONDS = 0.5
"""Between two looks at the step in flight."""

LOOKS = 8
"""That find a step late, one after another, until it is given up: this process may have been stopped itself, with its
machine or in a debugger, and then has not seen yet what has landed."""


class RankLost(TokenSpeedError):
    """A rank has ended, hangs or cannot be reached: nothing can be computed without it."""


class Follow(msgspec.Struct, tag="follow", frozen=True):
    """The first and only frame to a rank: which one it is, and of what engine."""

    config: EngineConfig
    rank: int
    port: int

    @property
    def place(self) -> Place:
        world = self.config.parallel.world
        return Place(self.rank, world, self.rank, world, LOOPBACK, self.port)


@dataclass(frozen=True, slots=True)
class _Child:
    rank: int
    process: asyncio.subprocess.Process
    channel: Channel[Failed]


class Ranks:
    """Every rank but this one, number 0 at `place`. All methods belong to one event loop."""

    program = "tokenspeed.engine.rank"
    """The module that a rank runs."""

    def __init__(self, place: Place, join_seconds: float, held: socket.socket | None = None) -> None:
        """`held` keeps the port of `place` from others; it is closed in the end."""
        self.place = place
        self._held = held
        self.join_seconds = join_seconds
        self._children: list[_Child] = []
        self._watches: list[asyncio.Task[None]] = []
        self._ending = False
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @classmethod
    async def start(cls, config: EngineConfig, *, join_seconds: float, log_level: str, log_format: str) -> Self:
        """The ranks that a launcher has started, or else new ones on this machine, loading. `join_seconds` is how long
        a launcher's may take to come. Raises `ConfigError` where the launcher started another number of them."""
        place = Place.launched(os.environ)
        world = config.parallel.world
        if place is not None:
            if (place.rank, place.world) != (0, world):
                raise ConfigError(
                    f"an engine of {world} ranks cannot be served by RANK={place.rank} of WORLD_SIZE={place.world}"
                )
            return cls(place, join_seconds)
        held = _held_port()
        ranks = cls(Place(0, world, 0, world, LOOPBACK, int(held.getsockname()[1])), START_SECONDS, held)
        try:
            for rank in range(1, world):
                await ranks._start(Follow(config, rank, ranks.place.port), log_level, log_format)
        except BaseException:
            await ranks.end(at_once=True)
            raise
        return ranks

    async def _start(self, follow: Follow, log_level: str, log_format: str) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", self.program, str(theirs.fileno()), log_level, log_format,
                    stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                )  # fmt: skip
                reader, writer = await asyncio.open_unix_connection(sock=ours)
            except BaseException:
                ours.close()
                raise
        child = _Child(follow.rank, process, Channel(reader, writer, Failed))
        child.channel.send(follow)
        self._children.append(child)
        self._watches.append(asyncio.create_task(self._watch(child)))

    async def _watch(self, child: _Child) -> None:
        said: Failed | None = None
        with contextlib.suppress(EOFError):
            said = await child.channel.receive()
        status = await child.process.wait()
        if said is not None and said.config:
            self._lose(ConfigError(f"rank {child.rank}: {said.error}"))
        elif said is not None:
            self._lose(RankLost(f"rank {child.rank} failed: {said.error}"))
        else:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self._lose(RankLost(f"rank {child.rank} {how}"))

    def _lose(self, error: TokenSpeedError) -> None:
        if not self._lost.done() and not self._ending:
            self._lost.set_exception(error)

    def lose_soon(self, error: EOFError) -> None:
        """From any thread: a rank cannot be told anything any more. What is known of its end is better said."""
        loop = self._lost.get_loop()
        loop.call_soon_threadsafe(loop.call_later, NOTICE_SECONDS, self._lose, RankLost(str(error)))

    def watch_steps(self, stuck: Callable[[float], int | None], seconds: float) -> None:
        """From now on `stuck` says which step has been in flight for too long, if one has."""
        self._watches.append(asyncio.create_task(self._watch_steps(stuck, seconds)))

    async def _watch_steps(self, stuck: Callable[[float], int | None], seconds: float) -> None:
        step, looks = None, 0
        while looks < LOOKS:
            await asyncio.sleep(min(LOOK_SECONDS, seconds / (2 * LOOKS)))
            before, step = step, stuck(seconds)
            looks = looks + 1 if step is not None and step == before else 0
        self._lose(
            RankLost(
                f"step {step} has not landed for {seconds:g} s (--watchdog-seconds): a rank or a collective hangs; "
                f"look at what each of the {self.place.world} ranks does, with py-spy dump for example, and at its log"
            )
        )

    async def while_alive(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`. Raises `RankLost` or `ConfigError` as soon as a rank is lost, also where `work`
        fails of that."""
        task = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if task.done() and not task.cancelled() and task.exception() is not None:
                await asyncio.wait({self._lost}, timeout=NOTICE_SECONDS)
            if self._lost.done():
                self._lost.result()
            return await task
        finally:
            task.cancel()

    def let_go(self) -> bool:
        """From now on a rank may end. Whether one was lost before."""
        self._ending = True
        return self._lost.done()

    async def end(self, *, at_once: bool = False) -> None:
        """Wait until the ranks that were started here have ended, and kill those that do not; or do so `at_once`."""
        self._ending = True
        if self._held is not None:
            self._held.close()
        for child in self._children:
            if not at_once:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(child.process.wait(), END_SECONDS)
            if child.process.returncode is None:
                child.process.kill()
                await child.process.wait()
            child.channel.close()
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        if self._lost.done() and not self._lost.cancelled():
            self._lost.exception()  # seen, also where nobody waited for it


def _held_port() -> socket.socket:
    """A socket bound to a free port, where this process alone can listen. Rank 0 listens seconds later, when torch is
    loaded; a port that is only found free may belong to any connection of this machine by then."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # whoever listens there has it set, too
    held.bind((LOOPBACK, 0))
    return held
