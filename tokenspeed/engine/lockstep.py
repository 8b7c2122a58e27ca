"""The control plane of every rank gets the same calls, in the same order: so all plan alike, and no plan is ever sent.

Rank 0 serves, and its calls are what happens: which request came and at what time, when a step was planned, with which
tokens and after how many seconds it landed. They are recorded as for a file (`_core/record.py`), and sent to the other
ranks in a frame for each step. A follower makes them again; where rank 0 has launched a plan it launches its own, and
before it commits a step it waits for its own flight, which must have brought the same tokens.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import msgspec
import numpy as np

from tokenspeed._core.pools import ControlPlane
from tokenspeed._core.record import CONSTRUCT, Answer, Call, Recorder, constructed, unwrap
from tokenspeed.batch import NO_STEP, Int32Array, Plan, PlanBuffers, StepResult
from tokenspeed.errors import InvariantBroken
from tokenspeed.executor.interface import Binding, Executor, Flight, Mask
from tokenspeed.request import SamplingParams

T = TypeVar("T")

LOOKS = frozenset({"dump"})
"""Methods that are recorded but change nothing."""

KEEP_ALIVE_SECONDS = 5.0
"""After so long without a frame an empty one is sent: a rank that is gone is noticed by sending."""


class Bound(msgspec.Struct, array_like=True, frozen=True):
    """How a newly bound request samples, and whether the rank that decides its tokens is sent masks: see `Binding`."""

    params: SamplingParams
    seed: int
    stop_ids: list[int]
    masked: bool


class Frame(msgspec.Struct, array_like=True, frozen=True):
    """Calls of the control plane since the last frame, and what rank 0 did then: it launched the plan that the last of
    them gave, of step `step`, or `NO_STEP`.

    `bound` is how the newly bound requests of that plan sample, in the order of its bindings: not every rank samples,
    but what a step computes depends on it, too. `masks`, if not None, are those of the step that was launched last,
    where ranks other than 0 decide tokens. `digest` is of the plan, empty unless debugging.
    """

    calls: list[Call]
    step: int = NO_STEP
    bound: list[Bound] = []
    masks: list[bytes | None] | None = None
    digest: bytes = b""


encoded = msgspec.msgpack.Encoder().encode
decoded = msgspec.msgpack.Decoder(Frame, ext_hook=unwrap).decode


class Leader:
    """Rank 0's side: the recorder of its control plane, which tells the other ranks what to do.

    `send` blocks and is called from a thread of this object's own; what it raises goes to `lost`, in that thread.
    `debug` sends a digest of each plan along, `sends_masks` the masks of samples that wait for one: where other ranks
    decide tokens, too.
    """

    def __init__(
        self,
        send: Callable[[bytes], None],
        lost: Callable[[EOFError], None],
        *,
        debug: bool,
        sends_masks: bool = False,
    ) -> None:
        self._send = send
        self.sends_masks = sends_masks
        self._lost = lost
        self._recorder: Recorder | None = None
        self._debug = debug
        self._calls: list[Call] = []
        self._in_flight: deque[int] = deque()
        self._moved = time.monotonic()
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._tell, name="tokenspeed-lockstep", daemon=True)
        self._thread.start()

    def through(self, recorder: Recorder) -> Self:
        """From now on `recorder` makes the calls, and keeps them, too."""
        self._recorder = recorder
        return self

    # The control plane's calls -------------------------------------------------------------------

    def record(self, method: str, call: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]) -> T:
        """Make a call, and have the others make it. One that raises has changed nothing, and is not repeated."""
        value = call(*args, **kwargs) if self._recorder is None else self._recorder.record(method, call, args, kwargs)
        if method in LOOKS:
            return value
        # Where a plan is filled in is each rank's own.
        self._calls.append(Call.of(method, [arg for arg in args if not isinstance(arg, PlanBuffers)], kwargs))
        if method == "commit":
            self._in_flight.popleft()
            self._moved = time.monotonic()
        if method == "submit" or (method == "plan" and value is None):
            # No launch need follow: what a request brings must not pile up here.
            self._flush(Frame(self._calls))
        return value

    def launches(self, plan: Plan, bindings: Sequence[Binding]) -> None:
        """`plan`, which the last call gave, is being launched: the others do so as soon as they hear of it."""
        if not self._in_flight:
            self._moved = time.monotonic()
        self._in_flight.append(plan.step)
        digest = Answer.of(plan).digest if self._debug else b""
        bound = [
            Bound(each.params, each.seed, each.stop_ids.tolist(), each.masked and self.sends_masks)
            for each in bindings
        ]
        self._flush(Frame(self._calls, plan.step, bound, None, digest))

    def masks(self, masks: Sequence[Mask]) -> None:
        """These were given to the step that was launched last."""
        told = [None if mask is None else mask.tobytes() for mask in masks]
        self._flush(Frame(self._calls, masks=told))

    def stuck(self, seconds: float) -> int | None:
        """The step in flight that should have landed if no step has for so many seconds, else None."""
        waited = time.monotonic() - self._moved
        return self._in_flight[0] if self._in_flight and waited > seconds else None

    def close(self) -> None:
        """The others are to end behind what they were told. Waits until they were told, or a second."""
        self._frames.put(None)
        self._thread.join(1.0)
        if self._recorder is not None:
            self._recorder.close()

    # The thread that tells -----------------------------------------------------------------------

    def _flush(self, frame: Frame) -> None:
        self._frames.put(encoded(frame))
        self._calls = []

    def _tell(self) -> None:
        try:
            while (frame := self._next()) is not None:
                self._send(frame)
            self._send(b"")
        except EOFError as error:
            self._lost(error)


    def _next(self) -> bytes | None:
        try:
            return self._frames.get(timeout=KEEP_ALIVE_SECONDS)
        except queue.Empty:
            return encoded(Frame([]))


class LeadingExecutor:
    """Rank 0's executor: whatever it launches the others launch, too."""

    def __init__(self, executor: Executor, leader: Leader) -> None:
        self._executor = executor
        self._leader = leader
        self.new_buffers = executor.new_buffers
        self.close = executor.close

    @property
    def num_blocks(self) -> int:
        return self._executor.num_blocks

    def launch(self, plan: Plan, bindings: Sequence[Binding]) -> Flight:
        self._leader.launches(plan, bindings)
        flight = self._executor.launch(plan, bindings)
        return _LeadingFlight(flight, self._leader) if flight.masked and self._leader.sends_masks else flight


class _LeadingFlight:
    """A step whose masks are for other ranks, too."""

    __slots__ = ("_flight", "_leader", "masked", "tokens")

    def __init__(self, flight: Flight, leader: Leader) -> None:
        self._flight, self._leader = flight, leader
        self.masked = flight.masked
        self.tokens = flight.tokens

    def mask(self, masks: Sequence[Mask]) -> None:
        self._leader.masks(masks)
        self._flight.mask(masks)


class Follower:
    """Another rank's side: its own control plane and executor, driven by what rank 0 tells.

    `debug` recounts the control plane after every commit, as rank 0 does. `broken` raises what a step has raised here,
    as soon as it has: rank 0 may wait for this very step, and never say that it has landed. Belongs to one event loop.
    """

    def __init__(self, executor: Executor, *, debug: bool) -> None:
        self._executor = executor
        self._debug = debug
        self._made: ControlPlane | None = None
        self._flights: deque[tuple[int, asyncio.Task[StepResult]]] = deque()
        self._last: Flight | None = None
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._buffers = deque(executor.new_buffers() for _ in range(2))  # as many steps as can be in flight
        self._planned: Plan | None = None

    @property
    def core(self) -> ControlPlane:
        """This rank's control plane, which the first frame makes."""
        if self._made is None:
            raise InvariantBroken("rank 0 uses a control plane that it has not made")
        return self._made

    async def follow(self, data: bytes) -> None:
        """Do what one frame says. Raises `InvariantBroken` where this rank comes to anything else than rank 0."""
        frame = decoded(data)
        self._planned = None
        for call in frame.calls:
            await self._make(call)
        plan = self._planned
        if (NO_STEP if plan is None else plan.step) != frame.step:
            raise InvariantBroken(f"rank 0 launches step {frame.step}, this rank plans {plan and plan.step}")
        if frame.masks is not None and self._last is not None:
            self._last.mask([None if mask is None else np.frombuffer(mask, np.int32) for mask in frame.masks])
        if plan is None:
            return
        if frame.digest and Answer.of(plan).digest != frame.digest:
            raise InvariantBroken(f"step {plan.step}: this rank's plan is not rank 0's")
        self._buffers.rotate()
        flight = self._last = self._executor.launch(plan, self._bindings(plan, frame.bound))
        landing = asyncio.create_task(_landing(flight))
        landing.add_done_callback(self._look)
        self._flights.append((plan.step, landing))

    async def _make(self, call: Call) -> None:
        args, kwargs = call.args, call.kwargs
        if call.method == CONSTRUCT:
            self._made = constructed(call)
            return
        if call.method == "plan":
            self._planned = self.core.plan(args[0], self._buffers[0])
            return
        if call.method == "commit":
            await self._landed(*args, **kwargs)
        method: Callable[..., object] = getattr(self.core, call.method)
        method(*args, **kwargs)
        if self._debug and call.method == "commit" and (violation := self.core.check()) is not None:
            raise InvariantBroken(violation)

    async def _landed(self, step: int, tokens: Int32Array, *_: Any, **__: Any) -> None:
        """Wait for this rank's own flight of a step that has landed on rank 0."""
        launched, landing = self._flights.popleft()
        result = await landing
        if launched != step or not np.array_equal(result.tokens, tokens):
            raise InvariantBroken(
                f"step {step}: rank 0 has the tokens {tokens.tolist()}, this rank in step {launched} "
                f"{result.tokens.tolist()}"
            )

    def _look(self, landing: asyncio.Task[StepResult]) -> None:
        if not landing.cancelled() and (error := landing.exception()) is not None and not self.broken.done():
            self.broken.set_exception(error)

    def _bindings(self, plan: Plan, bound: list[Bound]) -> list[Binding]:
        bindings = []
        for request_id, each in zip(plan.bound_ids.tolist(), bound, strict=True):
            tokens, prompt_len = self.core.tokens_of(request_id)
            stop_ids = np.array(each.stop_ids, dtype=np.int32)
            bindings.append(Binding(each.params, tokens, prompt_len, each.seed, stop_ids, each.masked))
        return bindings


async def _landing(flight: Flight) -> StepResult:
    return await flight.tokens()
