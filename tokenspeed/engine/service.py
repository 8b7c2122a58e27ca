"""The engine behind its messages: loads an executor, runs the step loop, answers. One per engine process.

The same service runs inside the caller's event loop with `in_process=True`.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import secrets
from collections.abc import Callable

import msgspec

from tokenspeed._core import Misuse, Scheduler
from tokenspeed.batch import BatchLimits
from tokenspeed.config import EngineConfig
from tokenspeed.engine.messages import (
    Abort,
    Accepted,
    ChoiceTokens,
    Failed,
    FinishAt,
    FromEngine,
    Heartbeat,
    Loading,
    Ready,
    Refused,
    Shutdown,
    Start,
    Submit,
    ToEngine,
    Tokens,
)
from tokenspeed.engine.step_loop import StepLoop
from tokenspeed.errors import ConfigError, InvalidRequest
from tokenspeed.executor.interface import Executor
from tokenspeed.executor.load import LoadedExecutor, load_executor

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.25
TIMING_LINE_SECONDS = 10.0


def _submitted(loop: StepLoop, message: Submit) -> Accepted | Refused:
    """The answer to one submission. No request, however malformed, goes further than this."""
    try:
        refusal = loop.submit(message)
    except (msgspec.MsgspecError, InvalidRequest, Misuse) as error:
        return Refused(id=message.id, reason="INVALID", detail=str(error))
    if refusal is None:
        return Accepted(message.id)
    return Refused(id=message.id, reason=refusal.name, retry_after=loop.retry_after())


class EngineService:
    """Owns the control plane, the executor and the loop of one engine. `emit` takes every answer.

    `emit` is called on the event loop, except while loading, when progress comes from a worker thread
    through `call_soon_threadsafe`.
    """

    def __init__(self, config: EngineConfig, emit: Callable[[FromEngine], None]) -> None:
        self._config = config
        self._emit = emit
        self._loop: StepLoop | None = None
        self._executor: Executor | None = None
        self._serving: asyncio.Task[None] | None = None
        self._helpers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Load, then serve in background tasks. Emits `Ready`, or `Failed` and raises what went wrong."""
        event_loop = asyncio.get_running_loop()

        def progress(stage: str, done: int, total: int) -> None:
            event_loop.call_soon_threadsafe(self._emit, Loading(stage, done, total))

        beat = asyncio.create_task(self._beat())
        try:
            loaded = await asyncio.to_thread(load_executor, self._config, progress)
            self._executor = loaded.executor
            self._loop = self._build(loaded)
        except ConfigError as error:
            beat.cancel()
            self._emit(Failed(str(error), config=True))
            raise
        except Exception as error:
            # Not a rescue: whoever waits for this engine is told why it ends.
            beat.cancel()
            log.exception("loading failed")
            self._emit(Failed(f"{type(error).__name__}: {error}", config=False))
            raise
        # What was loaded lives until the end: keep the collector from walking it during steps.
        gc.collect()
        gc.freeze()
        self._serving = asyncio.create_task(self._serve(self._loop))
        self._helpers = [beat, asyncio.create_task(self._report(self._loop))]
        self._emit(
            Ready(
                max_model_len=loaded.max_model_len,
                num_blocks=loaded.executor.num_blocks,
                block_size=self._config.block_size,
                summary=loaded.summary,
            )
        )

    def _build(self, loaded: LoadedExecutor) -> StepLoop:
        limits: BatchLimits = loaded.limits
        core = Scheduler(
            num_blocks=loaded.executor.num_blocks,
            limits=limits,
            max_model_len=loaded.max_model_len,
            max_queued=self._config.max_queued_requests,
            prefix_caching=self._config.enable_prefix_caching,
            hash_key=secrets.token_bytes(16),
        )
        return StepLoop(
            core,
            loaded.executor,
            overlap=self._config.overlap,
            vocab_size=loaded.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            publish=self._publish,
            debug=os.environ.get("TOKENSPEED_DEBUG") == "1",
        )

    def handle(self, message: ToEngine) -> None:
        """One input. Called on the event loop, so always between two calls of the control plane."""
        loop = self._loop
        if loop is None:
            return
        match message:
            case Submit():
                self._emit(_submitted(loop, message))
            case Abort(request_id):
                loop.abort(request_id)
            case FinishAt(request_id, num_tokens):
                try:
                    loop.finish(request_id, num_tokens)
                except Misuse as error:
                    log.error("a request is aborted because its end makes no sense: %s", error)
                    loop.abort(request_id)
            case Shutdown():
                loop.stop()
            case Start():
                raise ValueError("the engine was started twice")

    async def wait(self) -> None:
        """Until the step loop ends: by `Shutdown`, or by raising what broke it."""
        assert self._serving is not None
        await self._serving

    async def close(self) -> None:
        """Stop the loop after its steps in flight and release the executor's thread and memory."""
        if self._loop is not None:
            self._loop.stop()
        for task in self._helpers:
            task.cancel()
        tasks = self._helpers if self._serving is None else [*self._helpers, self._serving]
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._executor is not None:
            self._executor.close()

    def _publish(self, choices: list[ChoiceTokens]) -> None:
        assert self._loop is not None
        self._emit(Tokens(choices, self._loop.stats()))

    async def _serve(self, loop: StepLoop) -> None:
        try:
            await loop.run()
        except Exception as error:
            # Not a rescue: every stream is told, then the engine ends with this very exception.
            log.exception("the step loop failed; the engine ends")
            log.error("state of the control plane: %s", loop.dump())
            self._emit(Failed(f"{type(error).__name__}: {error}", config=False))
            raise

    async def _beat(self) -> None:
        while True:
            self._emit(Heartbeat(self._loop.stats() if self._loop is not None else None))
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _report(self, loop: StepLoop) -> None:
        try:
            while True:
                await asyncio.sleep(TIMING_LINE_SECONDS)
                self._log_timing(loop)
        finally:
            self._log_timing(loop)

    @staticmethod
    def _log_timing(loop: StepLoop) -> None:
        line = loop.timer.line()
        if line is not None:
            log.info(line)
