"""How the front end reaches its engine: a child process over a private socket, or the same event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from typing import Protocol

from tokenspeed.config import EngineConfig
from tokenspeed.engine.messages import Failed, FromEngine, Lost, Ready, Shutdown, Start, ToEngine
from tokenspeed.engine.transport import Hearing

log = logging.getLogger(__name__)

QUIET_TORCH = {"OMP_WAIT_POLICY": "passive"}
"""Torch's own threads sleep after a run instead of spinning for 8 ms on a core that the kernels' threads need:
30 → 41 tok/s of a bfloat16 decode on two cores. Only a process that starts with it can have it."""

EXIT_SECONDS = 10.0
"""How long a child may take to end after `Shutdown` before it is killed."""

Heard = FromEngine | Lost
Receive = Callable[[Heard], None]


class EngineLink(Protocol):
    """One engine. `receive` gets every message from it, on the event loop, `Failed` at most once and last."""

    async def start(self, config: EngineConfig, receive: Receive) -> None:
        """Begin loading; returns before the engine is ready."""

    def send(self, message: ToEngine) -> None:
        """Never blocks; what is sent to an engine that is over is dropped."""

    async def stop(self) -> None:
        """End the engine and wait for it. Idempotent; an engine stopped before it was started never starts."""


class MortalLink(EngineLink, Protocol):
    """One that can also be ended by force."""

    def kill(self) -> None:
        """`Failed` follows, unless it was over."""


class ProcessLink:
    """The engine as a child process. A `Failed` is made up when the child dies without a word.

    The two share an unnamed pair of sockets, so no other process can reach either end, and nothing is left
    behind however they end.
    """

    program = "tokenspeed.engine.process"
    """The module that is run."""

    def __init__(self, *, log_level: str = "info", log_format: str = "text") -> None:
        self._log = (log_level, log_format)
        self._channel: Hearing[FromEngine] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._stopping = False
        self._ready = False
        self._failed = False

    async def start(self, config: EngineConfig, receive: Receive) -> None:
        if self._stopping:
            receive(Failed("the engine was stopped before it started", config=False))
            return
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._process = await asyncio.create_subprocess_exec(
                    sys.executable, "-m", self.program, str(theirs.fileno()), *self._log,
                    stdin=asyncio.subprocess.DEVNULL, pass_fds=(theirs.fileno(),), start_new_session=True,
                    env=QUIET_TORCH | os.environ,
                )  # fmt: skip
            _, self._channel = await asyncio.get_running_loop().create_unix_connection(
                lambda: Hearing[FromEngine](FromEngine, lambda message: self._heard(message, receive)), sock=ours
            )
        except BaseException:
            ours.close()  # a child that was started reads the end of the stream and ends
            raise
        self._channel.send(Start(config))
        self._reader = asyncio.create_task(self._until_over(self._channel, receive))
        if self._stopping:
            self._process.kill()

    def _heard(self, message: FromEngine, receive: Receive) -> None:
        self._failed = self._failed or isinstance(message, Failed)
        self._ready = self._ready or isinstance(message, Ready)
        receive(message)

    async def _until_over(self, channel: Hearing[FromEngine], receive: Receive) -> None:
        try:
            await channel.over
        except EOFError:
            if not self._failed:
                receive(Failed(f"the engine process is gone ({await self._status()})", config=False))
        except Exception as error:
            # Whatever it was, nobody listens to the engine any more: every stream must hear of it.
            log.exception("reading from the engine failed")
            if not self._failed:
                receive(Failed(f"reading from the engine failed: {type(error).__name__}", config=False))

    async def _status(self) -> str:
        assert self._process is not None
        try:
            code = await asyncio.wait_for(self._process.wait(), 1.0)
        except TimeoutError:
            return "still running"
        return f"killed by signal {-code}" if code < 0 else f"exit status {code}"

    def send(self, message: ToEngine) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def kill(self) -> None:
        """End the child at once, stopped or not; its end is told like any other."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    @property
    def pid(self) -> int | None:
        """The child's process id, None before `start`."""
        return None if self._process is None else self._process.pid

    async def stop(self) -> None:
        self._stopping = True
        if self._process is None:
            return
        self.send(Shutdown())
        if not self._ready and self._process.returncode is None:
            # An engine that is still loading has nothing to finish, and would read `Shutdown` only afterwards.
            self._process.kill()
        try:
            await asyncio.wait_for(self._process.wait(), EXIT_SECONDS)
        except TimeoutError:
            log.warning("the engine process did not end within %.0f s and is killed", EXIT_SECONDS)
            self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()


class InProcessLink:
    """The engine on the caller's event loop: tests, notebooks, debuggers. Imports torch into this process."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    async def start(self, config: EngineConfig, receive: Receive) -> None:
        from tokenspeed.engine.service import EngineService  # noqa: PLC0415

        if self._stopping:
            receive(Failed("the engine was stopped before it started", config=False))
            return
        service = EngineService(config, receive)
        self._send = service.handle
        self._close = service.close
        self._task = asyncio.create_task(service.start())
        # A failed start was told through `receive`; nobody awaits this task.
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def send(self, message: ToEngine) -> None:
        if self._task is not None:
            self._send(message)

    async def stop(self) -> None:
        self._stopping = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)
            await self._close()
