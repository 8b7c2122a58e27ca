"""The engine behind its messages: loads an executor, runs the step loop, answers. One per engine process.

The same service runs inside the caller's event loop with `in_process=True`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenspeed._core import Misuse, Policy, Refusal
from tokenspeed._core.pools import ControlPlane, control_plane
from tokenspeed._core.record import Journal, Recorder, Recording, recorded_through
from tokenspeed.config import STEERED_FLOOR, EngineConfig
from tokenspeed.engine.daemon import in_daemon_thread
from tokenspeed.engine.grammars import Grammars
from tokenspeed.engine.lockstep import Leader, LeadingExecutor
from tokenspeed.engine.messages import (
    Abort,
    Accepted,
    ChoiceTokens,
    DropCached,
    Dropped,
    Failed,
    FinishAt,
    FromEngine,
    Heartbeat,
    Learn,
    Learnt,
    Loading,
    Ready,
    Refused,
    Shutdown,
    Start,
    Submit,
    ToEngine,
    Tokens,
)
from tokenspeed.engine.ranks import Ranks
from tokenspeed.engine.step_loop import StepLoop
from tokenspeed.errors import ConfigError, InvalidRequest
from tokenspeed.executor.interface import Executor
from tokenspeed.executor.load import JOIN_SECONDS, LoadedExecutor, Progress, load_executor
from tokenspeed.parallel.launched import served_mesh
from tokenspeed.parallel.world import World

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.25
TIMING_LINE_SECONDS = 10.0


def _submitted(loop: StepLoop, message: Submit) -> Accepted | Refused:
    """The answer to one submission. No request, however malformed, goes further than this."""
    try:
        refusal = loop.submit(message)
    except InvalidRequest as error:
        return Refused(id=message.id, reason="INVALID", detail=error.message, param=error.param)
    except Misuse as error:
        return Refused(id=message.id, reason="INVALID", detail=str(error))
    except MemoryError:
        log.error("a request is refused for want of memory in the engine process")
        refusal = Refusal.QUEUE_FULL
    if refusal is None:
        return Accepted(message.id)
    return Refused(id=message.id, reason=refusal.name, retry_after=loop.retry_after())


def _ended(loop: StepLoop, message: Abort | FinishAt) -> None:
    """A choice ends as its reader wants. An end that makes no sense is an abort, of a choice that there is."""
    try:
        if isinstance(message, FinishAt):
            loop.finish(message.id, message.num_tokens)
        else:
            loop.abort(message.id)
    except Misuse as error:
        log.error("a request is aborted because its end makes no sense: %s", error)
        with contextlib.suppress(Misuse):
            loop.abort(message.id)


def _policy(config: EngineConfig) -> Policy:
    floor = STEERED_FLOOR if config.tps_floor is None else config.tps_floor
    return Policy(
        tps_floor=floor,
        floor_is_promise=config.tps_floor is not None and floor > 0,
        footprints=config.session_admission,
        max_queue_seconds=config.max_queue_seconds,
    )


@contextlib.contextmanager
def _naming_record(path: str) -> Iterator[None]:
    """What the file system says of the recording, as the fault of its flag."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--record {path}: {error.strerror}") from None


def _try_record(path: str) -> None:
    """Raise `ConfigError` if no recording can be made there: before the model is loaded, which may take minutes."""
    with _naming_record(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.unlink(path)


class EngineService:
    """Owns the control plane, the executor and the loop of one engine. `emit` takes every answer.

    `emit` is called on the event loop, except while loading, when progress comes from a worker thread
    through `call_soon_threadsafe`. The logs of other ranks are of `log_style`, level and format.
    """

    def __init__(
        self, config: EngineConfig, emit: Callable[[FromEngine], None], *, log_style: tuple[str, str] = ("info", "text")
    ) -> None:
        self._config = config
        self._emit = emit
        self._log_style = log_style
        self._ranks: Ranks | None = None
        self._world: World | None = None
        self._loop: StepLoop | None = None
        self._executor: Executor | None = None
        self._recording: Recording | None = None
        self._serving: asyncio.Task[None] | None = None
        self._helpers: list[asyncio.Task[None]] = []
        self._grammars = Grammars()
        self._lessons: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load, then serve in background tasks. Emits `Ready`, or `Failed` and raises what went wrong."""
        event_loop = asyncio.get_running_loop()

        def progress(stage: str, done: int, total: int) -> None:
            event_loop.call_soon_threadsafe(self._emit, Loading(stage, done, total))

        beat = asyncio.create_task(self._beat())
        try:
            if self._config.record is not None:
                _try_record(self._config.record)
            loaded = await self._load(progress)
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

    async def _load(self, progress: Progress) -> LoadedExecutor:
        """An executor, and with it this rank's place among the others."""
        if served_mesh(self._config.parallel, self._config.tps_floor).world == 1:
            return await asyncio.to_thread(load_executor, self._config, progress)
        level, style = self._log_style
        ranks = self._ranks = await Ranks.start(
            self._config, join_seconds=JOIN_SECONDS, log_level=level, log_format=style
        )
        # A thread that waits for a rank that never comes must not keep the process.
        loaded = await ranks.while_alive(
            in_daemon_thread(
                lambda: load_executor(self._config, progress, ranks.place, join_seconds=ranks.join_seconds)
            )
        )
        self._world = loaded.world
        return loaded

    def _build(self, loaded: LoadedExecutor) -> StepLoop:
        debug = os.environ.get("TOKENSPEED_DEBUG") == "1"
        executor, leader = loaded.executor, None
        if self._ranks is not None and loaded.world is not None:
            several = len(loaded.pool_blocks) > 1
            leader = Leader(loaded.world.send, self._ranks.lose_soon, debug=debug, sends_masks=several)
            self._ranks.watch_steps(leader.stuck, self._config.watchdog_seconds)
            executor = LeadingExecutor(executor, leader)
        core = self._control_plane(loaded, leader)
        return StepLoop(
            core,
            executor,
            overlap=self._config.overlap,
            vocab_size=loaded.vocab_size,
            eos_token_ids=loaded.eos_token_ids,
            publish=self._publish,
            grammars=self._grammars,
            tps_floor=STEERED_FLOOR if self._config.tps_floor is None else self._config.tps_floor,
            tell_cache=self._cache_teller(core),
            debug=debug,
        )

    def _cache_teller(self, core: ControlPlane) -> Callable[[], None]:
        """What tells the front end of cached blocks after each step; nothing if it does not want to know."""
        if not self._config.cache_events:
            return lambda: None
        core.open_cache_log()

        def tell() -> None:
            for events in core.take_cache_events():
                self._emit(events)

        return tell

    def _control_plane(self, loaded: LoadedExecutor, leader: Leader | None) -> ControlPlane:
        sizes: dict[str, Any] = {
            "num_blocks": loaded.pool_blocks,
            "limits": loaded.limits,
            "max_model_len": loaded.max_model_len,
            "max_queued": self._config.max_queued_requests,
            "prefix_caching": self._config.enable_prefix_caching,
            "hash_key": secrets.token_bytes(16),
            "policy": _policy(self._config),
        }
        path = self._config.record
        if path is None and leader is None:
            return control_plane(**sizes)
        recorder: Recorder | None = leader
        with _naming_record(path or ""):
            if path is not None:
                journal = Journal(Path(path))
                log.warning("every call of the control plane, prompts included, is recorded in %s", path)
                recorder = journal if leader is None else leader.through(journal)
            assert recorder is not None
            self._recording = recorded_through(recorder, **sizes)
        return self._recording

    def handle(self, message: ToEngine) -> None:
        """One input. Called on the event loop, so always between two calls of the control plane."""
        loop = self._loop
        if loop is None:
            return
        match message:
            case Submit():
                self._emit(_submitted(loop, message))
            case Learn():
                lesson = asyncio.create_task(self._learn(message))
                self._lessons.add(lesson)
                lesson.add_done_callback(self._lessons.discard)
            case Abort() | FinishAt():
                _ended(loop, message)
            case DropCached(id):
                self._emit(Dropped(id, *loop.drop_cached()))
            case Shutdown():
                loop.stop()
            case Start():
                raise ValueError("the engine was started twice")

    async def wait(self) -> None:
        """Until the step loop ends: by `Shutdown`, or by raising what broke it."""
        assert self._serving is not None
        await self._serving

    async def close(self) -> None:
        """Stop the loop after its steps in flight; release the executor's thread and memory, end the recording."""
        if self._loop is not None:
            self._loop.stop()
        self._grammars.close()
        background = [*self._helpers, *self._lessons]
        for task in background:
            task.cancel()
        tasks = background if self._serving is None else [*background, self._serving]
        *_, outcome = await asyncio.gather(*tasks, return_exceptions=True) if tasks else [None]
        served = self._serving is not None and outcome is None
        # A step that waits for a rank which is gone never ends, and neither does the executor; nor does one that waits
        # for what a loop that failed would have told the others.
        failed = self._serving is not None and not served
        lost = self._ranks is not None and (self._ranks.let_go() or failed)
        self._loop = None
        if self._recording is not None:
            try:
                self._recording.close()
            except OSError as error:
                log.error("the recording lacks its end: %s", error)
            self._recording = None
        if self._executor is not None and not lost:
            self._executor.close()
        if self._ranks is not None:
            await self._ranks.end(at_once=not served)
        if self._world is not None:
            self._world.leave()

    async def _learn(self, message: Learn) -> None:
        try:
            self._emit(await self._grammars.learn(message))
        except Exception:
            # Not a rescue: whoever waits for this grammar is told, and nothing else depends on it.
            log.exception("a grammar could not be compiled")
            self._emit(Learnt(message.id, held=False, error="the engine could not compile it"))

    def _publish(self, choices: list[ChoiceTokens]) -> None:
        assert self._loop is not None
        self._emit(Tokens(choices, self._loop.stats()))

    async def _serve(self, loop: StepLoop) -> None:
        try:
            await (loop.run() if self._ranks is None else self._ranks.while_alive(loop.run()))
        except Exception as error:
            # Not a rescue: every stream is told, then the engine ends with this very exception.
            self._loop = None
            log.exception("the step loop failed; the engine ends")
            log.error("state of the control plane: %s", loop.dump())
            self._emit(Failed(f"{type(error).__name__}: {error}", config=False))
            raise

    async def _beat(self) -> None:
        while True:
            loop = self._loop
            if loop is None:
                self._emit(Heartbeat(None))
            else:
                loop.look()
                self._emit(Heartbeat(loop.stats(), loop.histograms))
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
