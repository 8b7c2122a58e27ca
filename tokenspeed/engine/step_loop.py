"""The step loop: plan, launch, await the step before, commit, publish. This is the whole engine.

Inputs (submit, abort, finish) arrive on the same event loop while a step computes, so they always fall
between two calls of the control plane.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from tokenspeed._core import Refusal
from tokenspeed._core.pools import ControlPlane
from tokenspeed.batch import Finish, Int32Array, Logprobs, Plan, StepResult
from tokenspeed.engine.grammars import Constraint, Grammars
from tokenspeed.engine.messages import ChoiceTokens, EngineStats, PoolStats, Submit
from tokenspeed.engine.moves import Moves
from tokenspeed.engine.observe import Aborts, GenerationRate, Pace, StepHistograms
from tokenspeed.engine.step_timer import StepTimer
from tokenspeed.errors import InvalidRequest, InvariantBroken
from tokenspeed.executor.interface import Binding, Executor, Flight
from tokenspeed.request import MAX_SEED, SamplingParams, TokenLogprob

log = logging.getLogger(__name__)

LEAST_LOGPROB = -9999.0
"""Stands for the logarithm of 0, which JSON cannot say; the value that other engines use."""

Publish = Callable[[list[ChoiceTokens]], None]
Flights = deque[tuple[Plan, Flight]]


_PARAMS = msgspec.msgpack.Decoder(SamplingParams)


@dataclass(slots=True)
class Known:
    """What the loop keeps of a queued choice for its (re)binding and its outputs.

    `prompt_logprobs`, if asked for, begins with None: nothing precedes the first token.
    """

    params: SamplingParams
    seed: int
    stop_ids: Int32Array
    prompt_len: int
    arrived: float
    pace: Pace
    prompt_logprobs: list[TokenLogprob | None] | None
    constraint: Constraint
    num_tokens: int = 0
    queue_seconds: float | None = None
    started: bool = False


Gain = tuple[Known, tuple[int, int, int, int, int, int, int]]
"""An entry of a step's outputs, and whose it is."""


class StepLoop:
    """Drives one control plane and one executor. `overlap` is how many steps may be in flight while planning.

    `publish` is called once a step with everything that the step gave, and then `tell_cache`, which is also called when
    cached blocks were dropped. `tps_floor` is what streams are to keep that name none of their own. `debug` recounts
    the control plane's state after every commit and stops the engine at the first inconsistency.
    """

    def __init__(
        self,
        core: ControlPlane,
        executor: Executor,
        *,
        overlap: int,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        publish: Publish,
        grammars: Grammars | None = None,
        tps_floor: float = 0.0,
        tell_cache: Callable[[], None] = lambda: None,
        debug: bool = False,
    ) -> None:
        self._core = core
        self._executor = executor
        self._overlap = overlap
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._publish_to = publish
        self._tell_cache = tell_cache
        self._grammars = grammars or Grammars()
        self._moves = Moves()
        self._tps_floor = tps_floor
        self._debug = debug
        self._buffers = [executor.new_buffers() for _ in range(overlap + 1)]
        self._known: dict[int, Known] = {}
        self._slots: dict[int, int] = {}
        self._leaving: dict[int, tuple[float, int]] = {}
        self._aborts = Aborts()
        self._wake = asyncio.Event()
        self._stopping = False
        self._steps = 0
        self._refusals: Counter[str] = Counter()
        self._paces: dict[int, Pace] = {}
        self._below_floor = 0
        self._rate = GenerationRate()
        self.timer = StepTimer()
        self.histograms = StepHistograms()

    # Inputs ------------------------------------------------------------------------------------

    def submit(self, request: Submit) -> Refusal | None:
        """Queue one choice, or say why not. Takes effect at the next plan.

        Everything is checked again here, whoever sent it. Raises `InvalidRequest` or `Misuse` for what a front end
        should have refused, `MemoryError` where there is none left; nothing has changed then.
        """
        params, prompt = self._checked(request)
        eos = () if params.ignore_eos else self._eos
        stops = {*eos, *params.stop_token_ids}
        stop_ids = np.array(sorted(stops), dtype=np.int32)
        constraint = self._grammars.follow(request.grammar, stops)
        refusal = self._core.submit(
            request.id,
            prompt,
            now=time.monotonic(),
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            stop_ids=stop_ids,
            salt=request.salt,
            priority=request.priority,
            reuse_prefix=params.prompt_logprobs is None,
            session=request.session,
            tps_floor=request.tps_floor,
        )
        if refusal is not None:
            self._refusals[refusal.name.lower()] += 1
            return refusal
        scores: list[TokenLogprob | None] | None = None if params.prompt_logprobs is None else [None]
        pace = Pace(self._tps_floor if request.tps_floor is None else request.tps_floor)
        arrived = time.monotonic()
        self._known[request.id] = Known(
            params, request.seed, stop_ids, len(prompt), arrived, pace, scores, constraint
        )
        self._wake.set()
        return None

    def _checked(self, request: Submit) -> tuple[SamplingParams, Int32Array]:
        """Whatever would only fail later, in a step that others share; the control plane checks the rest."""
        try:
            params = _PARAMS.decode(request.params)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"its parameters cannot be read: {error}") from None
        params.check(self._vocab_size)
        if len(request.prompt) % 4:
            raise InvalidRequest("the prompt is cut off within a token id", param="prompt")
        prompt: Int32Array = np.frombuffer(request.prompt, dtype="<i4")
        if prompt.size and int(prompt.max()) >= self._vocab_size:
            raise InvalidRequest(f"the prompt has a token id of {int(prompt.max())}", param="prompt")
        room = self._core.max_length - prompt.size
        if params.min_tokens > max(room, 0):
            raise InvalidRequest(
                f"min_tokens is {params.min_tokens}, but context and cache have room for {room}", param="min_tokens"
            )
        if not 0 <= request.seed < MAX_SEED:
            raise InvalidRequest(f"a resolved seed is from 0 to 2**63 - 1, got {request.seed}", param="seed")
        return params, prompt

    def abort(self, request_id: int) -> None:
        """End a choice that nobody reads. Its slot and blocks come back when its last step lands."""
        if self._core.abort(request_id):
            self._leaving[request_id] = (time.monotonic(), self._steps)
            self._note_departures()
        self._forget(request_id)
        self._wake.set()

    def finish(self, request_id: int, num_tokens: int) -> None:
        """End a choice at a stop string after `num_tokens` generated tokens."""
        self._core.finish(request_id, num_tokens)
        self._forget(request_id)
        self._wake.set()

    def drop_cached(self) -> tuple[int, int]:
        """Free all cached blocks that no request holds: how many there were, and how many are held."""
        dropped = self._core.drop_cached()
        self._tell_cache()
        return dropped, self._core.stats().blocks_used

    def stop(self) -> None:
        """Let `run` return after the steps in flight."""
        self._stopping = True
        self._wake.set()

    # The loop ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until `stop`. Whatever a step raises ends the loop and is raised here."""
        flights: Flights = deque()
        turn = 0
        while True:
            plan = None if self._stopping else self._plan(turn)
            if plan is not None:
                flights.append((plan, self._executor.launch(plan, self._bindings(plan))))
                self._mask(flights)
                turn = (turn + 1) % len(self._buffers)
            if len(flights) > self._overlap or (plan is None and flights):
                launched, flight = flights.popleft()
                await self._land(launched, flight, flights)
            elif plan is None:
                if self._stopping:
                    return
                self._wake.clear()
                await self._wake.wait()

    def _plan(self, turn: int) -> Plan | None:
        start = time.perf_counter()
        plan = self._core.plan(time.monotonic(), self._buffers[turn])
        now = time.perf_counter()
        self.timer.plan += now - start
        if plan is not None:
            self.timer.launched(start)
        return plan

    def _bindings(self, plan: Plan) -> list[Binding]:
        """The sampling state of each newly bound slot, with every token known at this moment."""
        bindings = []
        for slot, request_id in zip(plan.bound[:, 0].tolist(), plan.bound_ids.tolist(), strict=True):
            known = self._known[request_id]
            if known.queue_seconds is None:
                known.queue_seconds = time.monotonic() - known.arrived
            tokens, prompt_len = self._core.tokens_of(request_id)
            self._slots[slot] = request_id
            masked = known.constraint.masked
            bindings.append(Binding(known.params, tokens, prompt_len, known.seed, known.stop_ids, masked))
        return bindings

    def _mask(self, flights: Flights) -> None:
        """Tell the oldest step in flight what its rows may sample: every token before it is known now."""
        if len(flights) == 1:
            _, flight = flights[0]
            flight.mask([self._mask_of(self._slots[slot]) for slot in flight.masked])

    def _mask_of(self, request_id: int) -> Int32Array | None:
        known = self._known.get(request_id)
        return None if known is None else known.constraint.mask

    async def _land(self, plan: Plan, flight: Flight, flights: Flights) -> None:
        result = await flight.tokens()
        start = time.perf_counter()
        self._collect_prompt_logprobs(plan, result)
        seconds = result.times.forward + result.times.sample
        outputs = self._core.commit(result.step, result.tokens, result.num_tokens, seconds)
        committed = time.perf_counter()
        if self._debug and (violation := self._core.check()) is not None:
            raise InvariantBroken(violation)
        self._steps += 1
        if self._leaving:
            self._note_departures()
        gains = [(known, entry) for entry in outputs.entries() if (known := self._known.get(entry[0])) is not None]
        if flight.masked:
            await self._moves.make(
                [
                    (known.constraint, token)
                    for known, (_, _, token, count, finish, _, _) in gains
                    if known.constraint.masked and count and finish == Finish.NONE
                ]
            )
        choices = self._choices(result, gains)
        self._mask(flights)
        if choices:
            self._publish_to(choices)
        self._tell_cache()
        done = time.perf_counter()
        self.timer.commit += committed - start
        self.timer.publish += done - committed
        wall = self.timer.landed(done, plan.num_rows, result.times, more=bool(flights))
        self.histograms.seconds.observe(wall)
        self.histograms.tokens.observe(plan.num_tokens)

    def _note_departures(self) -> None:
        """Measure how long aborted choices held their memory: a launched step may have to land first."""
        for request_id in [held for held in self._leaving if not self._core.holds(held)]:
            began, step = self._leaving.pop(request_id)
            self._aborts.note(time.monotonic() - began, self._steps - step)

    # Outputs -----------------------------------------------------------------------------------

    def _choices(self, result: StepResult, gains: list[Gain]) -> list[ChoiceTokens]:
        choices = []
        for known, (request_id, index, token, count, finish, stop_id, cached) in gains:
            if self._known.get(request_id) is not known:
                continue  # aborted while grammars moved on
            logprobs = None
            if result.logprobs is not None and known.params.logprobs is not None and count:
                logprobs = [_entry(result.logprobs, index, known.params.logprobs)]
            first = not known.started
            if first:
                known.started = True
                self._paces[request_id] = known.pace
            known.pace.tokens += count
            known.num_tokens += count
            ended = known.constraint.settle(finish) if count else finish
            if ended != finish:
                self._core.finish(request_id, known.num_tokens)
            choices.append(
                ChoiceTokens(
                    request_id,
                    [token] if count else [],
                    ended,
                    stop_id,
                    cached if first else 0,
                    (known.queue_seconds or 0.0) if first else 0.0,
                    logprobs,
                    known.prompt_logprobs if first else None,
                    known.constraint.error,
                )
            )
            if ended != Finish.NONE:
                self._forget(request_id)
        return choices

    def _forget(self, request_id: int) -> None:
        self._known.pop(request_id, None)
        self._paces.pop(request_id, None)

    def _collect_prompt_logprobs(self, plan: Plan, result: StepResult) -> None:
        """Append the scores of a chunk; a chunk recomputed after a preemption adds nothing."""
        for row, scores in result.prompt_logprobs.items():
            known = self._known.get(self._slots[int(plan.row_slot[row])])
            if known is None or known.prompt_logprobs is None or known.params.prompt_logprobs is None:
                continue
            first = int(plan.row_computed[row]) + 1
            for index in range(len(scores.token_ids)):
                if first + index == len(known.prompt_logprobs) < known.prompt_len:
                    known.prompt_logprobs.append(_entry(scores, index, known.params.prompt_logprobs))

    # Facts -------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Counters of now."""
        core = self._core.stats()
        return EngineStats(
            running=core.running,
            waiting=core.waiting,
            draining=core.draining,
            blocks_total=core.blocks_total,
            blocks_used=core.blocks_used,
            blocks_cached=core.blocks_cached,
            host_blocks_used=core.host_blocks_used,
            sessions_resident=core.sessions_resident,
            sessions_waiting=core.sessions_waiting,
            waiting_uncached_tokens=core.waiting_uncached_tokens,
            generation_rate=self._rate.tokens_a_second,
            streams_below_floor=self._below_floor,
            num_preemptions=core.preemptions,
            prompt_tokens=core.prompt_tokens,
            cached_tokens=core.cached_prompt_tokens,
            generation_tokens=core.generated_tokens,
            num_steps=self._steps,
            refusals=dict(self._refusals),
            num_aborts=self._aborts.count,
            slowest_abort_seconds=self._aborts.slowest_seconds,
            slowest_abort_steps=self._aborts.slowest_steps,
            pools=[PoolStats.of(pool) for pool in core.pools],
        )

    def look(self) -> None:
        """Count the streams below their floor and what all generate, for `stats`. Called with each heartbeat."""
        now = time.monotonic()
        self._rate.look(now, self._core.stats().generated_tokens)
        self._below_floor = sum(pace.is_below(now) for pace in self._paces.values())

    def dump(self) -> dict[str, object]:
        """The control plane's whole state, for the log of an engine that ends."""
        return self._core.dump()

    def retry_after(self) -> int:
        """After a refusal: whole seconds until it is worth while to ask again."""
        return math.ceil(self._core.retry_after)


def _entry(scores: Logprobs, index: int, top: int) -> TokenLogprob:
    return TokenLogprob(
        int(scores.token_ids[index]),
        max(float(scores.logprobs[index]), LEAST_LOGPROB),
        int(scores.ranks[index]),
        tuple(scores.top_ids[index, :top].tolist()),
        tuple(max(value, LEAST_LOGPROB) for value in scores.top_logprobs[index, :top].tolist()),
    )
