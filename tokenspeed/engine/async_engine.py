"""`AsyncEngine`: the programmatic face. Text and stop strings here, tokens in the engine behind a link."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Self

import msgspec

from tokenspeed.batch import CacheEvents
from tokenspeed.checkpoint.config import ModelConfig, read_model_config
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.config import EngineConfig
from tokenspeed.engine.admission import Terms, admit, as_error
from tokenspeed.engine.cache_watch import CacheBatch, CacheWatch
from tokenspeed.engine.daemon import in_daemon_thread
from tokenspeed.engine.grammar_intake import GrammarIntake
from tokenspeed.engine.health import Health, State
from tokenspeed.engine.intake import EngineFacts, Intake, Prompt, Taken
from tokenspeed.engine.link import EngineLink, Heard, InProcessLink, ProcessLink
from tokenspeed.engine.messages import (
    Abort,
    Accepted,
    DropCached,
    Dropped,
    EngineStats,
    Failed,
    FinishAt,
    Heartbeat,
    Learn,
    Learnt,
    Loading,
    Lost,
    Ready,
    Refused,
    Tokens,
)
from tokenspeed.engine.observe import StepHistograms
from tokenspeed.engine.questions import Questions
from tokenspeed.engine.running import Running
from tokenspeed.engine.stream import Ending, Stream
from tokenspeed.errors import ConfigError, TokenSpeedError, Unavailable
from tokenspeed.request import RequestOutput, SamplingParams
from tokenspeed.text.grammars.vocabulary import Vocabulary, marker_ids
from tokenspeed.text.load import TextSide, load_text
from tokenspeed.text.prompt_memory import MemoryStats, PromptMemory
from tokenspeed.text.template import ChatTemplate
from tokenspeed.text.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]

RETRY_LOADING = 5


class EngineFailed(TokenSpeedError):
    """The engine ended while starting or serving, not because of its configuration."""


class AsyncEngine:
    """One engine and its front end. `async with AsyncEngine(config) as engine` starts and stops it.

    The engine is a child process by default; `in_process=True` runs it on this event loop.
    `progress` is told (stage, done, total) in bytes while loading. All methods belong to one event loop.
    """

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        in_process: bool = False,
        progress: Progress | None = None,
        link: EngineLink | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        self.config.check()
        self._link: EngineLink = link or (InProcessLink() if in_process else ProcessLink())
        self._progress = progress
        self._state: State = "loading"
        self._error: str | None = None
        self._heard = time.monotonic()
        self._restarts = 0
        self._stats = EngineStats()
        self._steps = StepHistograms()
        self._ready: asyncio.Future[Ready] | None = None
        self._text: TextSide | None = None
        self._facts: EngineFacts | None = None
        self._intake: Intake | None = None
        self._memory: PromptMemory | None = None  # outlives an engine that is restarted
        self._ids = itertools.count(1)
        self._running = Running()
        self._drops: Questions[Dropped] = Questions()
        self._cache = CacheWatch(self.config.block_size, on=self.config.cache_events)
        self._grammars = GrammarIntake(self._vocabulary, self._teach)
        self._random = random.Random(self.config.seed) if self.config.seed is not None else None

    # Life --------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Load model and text side by side.

        Raises `ConfigError` for what cannot work as asked, `EngineFailed` for anything else that went wrong.
        """
        self._ready = asyncio.get_running_loop().create_future()
        try:
            source = await in_daemon_thread(lambda: resolve(self.config.model, self.config.load_format))
            await self._link.start(self.config, self._receive)
            text, model = await in_daemon_thread(lambda: _load_front(source, self.config))
            ready = await self._ready
            if self._state != "loading":
                raise EngineFailed(self._error or "the engine was stopped while it was loading")
        except BaseException as error:
            self._fail(str(error))
            await self._link.stop()
            raise
        self._text = text
        self._serve(EngineFacts.of(source, model, ready))

    async def stop(self, grace: float = 30.0) -> None:
        """Refuse new requests, let admitted ones end within `grace` seconds, abort the rest, end the engine."""
        if self._state in ("loading", "ready", "restarting"):
            self._state = "draining"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._running.idle.wait(), grace)
        for stream in self._running.streams():
            await stream.abort()
        await self._grammars.close()
        await self._link.stop()
        if self._state != "dead":
            self._fail("the engine was stopped")

    # Facts -------------------------------------------------------------------------------------------

    @property
    def facts(self) -> EngineFacts:
        """Available once `start` returned."""
        if self._facts is None:
            raise Unavailable("the model is still loading", retry_after=RETRY_LOADING)
        return self._facts

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; available once `start` returned."""
        return self._loaded_text().tokenizer

    @property
    def template(self) -> ChatTemplate | None:
        """The model's chat template, None if the checkpoint has none."""
        return self._loaded_text().template

    def _loaded_text(self) -> TextSide:
        if self._text is None:
            raise Unavailable("the model is still loading", retry_after=RETRY_LOADING)
        return self._text

    def health(self) -> Health:
        """Whether the engine serves, and when it was last heard of."""
        return Health(self._state, self._error, time.monotonic() - self._heard, self._restarts)

    def stats(self) -> EngineStats:
        """The engine's counters as of its last message, at most one heartbeat old."""
        return self._stats

    def memory_stats(self) -> MemoryStats:
        """What is remembered of prompts and answers, and how many prompt tokens came from there."""
        return MemoryStats() if self._memory is None else self._memory.stats()

    def step_histograms(self) -> StepHistograms:
        """How long the engine's steps took and how many tokens they had, as of its last heartbeat."""
        return self._steps

    # Requests ----------------------------------------------------------------------------------------

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        priority: int = 0,
        prompt_cache_key: str = "",
        tps_floor: float | None = None,
        make_ending: Callable[[], Ending] | None = None,
        texts: bool = True,
    ) -> Stream:
        """Check a request whole and queue it, or raise a `RequestError`; nothing has been streamed then.

        `request_id` is a label for the caller: it need not be unique. Prefix-cache hits are shared only
        between equal `cache_salt`s. Lower `priority` goes first. Requests with equal `prompt_cache_key`s (and
        salts) are turns of one session; without one they are recognised by the prompt that they continue.
        `tps_floor` > 0 is a promise of tokens per second: the request is refused (`FloorNotKept`) where it could
        not be kept. 0 is none, None the engine's. `make_ending` makes, for each choice, what ends it by its text
        where no stop string can say so; the finish reason is then `stop`. Without `texts` the outputs may have none:
        whoever wants token ids alone does not pay for a detokenizer. With n > 1 this returns when the first
        choice has its first token, unless the prompt is shorter than a KV block: the others then find it in the cache.
        """
        terms = Terms.checked(
            cache_salt=cache_salt, priority=priority, prompt_cache_key=prompt_cache_key, tps_floor=tps_floor
        )
        intake = self._serving()
        taken = await intake.take(prompt, params, terms.salt)
        params, grammar = taken.params, taken.params.grammar
        if grammar is not None:
            # What a grammar lets through is text of the answer, the marks of formats included.
            shown = marker_ids(self.tokenizer).union(params.shown_special_ids)
            params = msgspec.structs.replace(params, grammar=None, shown_special_ids=tuple(sorted(shown)))
        seed = params.seed if params.seed is not None else self._draw_seed()
        eos = frozenset() if params.ignore_eos else frozenset(self.facts.eos_token_ids)
        stream = Stream(
            request_id or f"req-{uuid.uuid4().hex}",
            taken.ids,
            [intake.choice(next(self._ids), index, params, eos, make_ending, texts) for index in range(params.n)],
            abort_choice=lambda id: self._link.send(Abort(id)),
            finish_choice=lambda id, tokens: self._link.send(FinishAt(id, tokens)),
            on_end=lambda stream: self._ended(stream, taken),
        )
        admitted = self._running.add(stream)
        at_once = 1 if params.n > 1 and self._caches(taken.ids, params) else params.n
        try:
            name = await self._grammars.take_for(grammar, terms.salt, admitted[0])
            if name is None:
                return stream  # aborted meanwhile
            self._serving()
            submits = terms.submits([choice.id for choice in stream.choices], taken.raw, params, seed, name)
            await admit(self._link.send, submits[:at_once], admitted[:at_once])
            if at_once < params.n and await stream.begun():
                # The prompt is in the cache now, but the grammar may have left the engine's.
                await self._grammars.take(grammar, terms.salt)
                await admit(self._link.send, submits[at_once:], admitted[at_once:])
        except BaseException:
            await stream.aclose()
            raise
        return stream

    def _caches(self, ids: Sequence[int], params: SamplingParams) -> bool:
        """Whether a prompt leaves blocks that an equal one finds."""
        reusable = self.config.enable_prefix_caching and params.prompt_logprobs is None
        return reusable and len(ids) > self.facts.block_size

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        priority: int = 0,
        prompt_cache_key: str = "",
        tps_floor: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """`submit` and iterate the deltas. Leaving the loop early, or cancelling its task, aborts the request."""
        stream = await self.submit(
            prompt, params or SamplingParams(), request_id=request_id, cache_salt=cache_salt, priority=priority,
            prompt_cache_key=prompt_cache_key, tps_floor=tps_floor,
        )  # fmt: skip
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    async def abort(self, request_id: str) -> bool:
        """Abort every running request with this label; False if there is none."""
        streams = self._running.labelled(request_id)
        for stream in streams:
            await stream.abort()
        return bool(streams)

    async def drop_cached(self) -> Dropped:
        """Free every KV block that is cached and that no request holds."""
        self._serving()
        return await self._drops.ask(lambda number: self._link.send(DropCached(number)))

    def watch_cache(self, start: int = 0) -> AsyncIterator[CacheBatch]:
        """What becomes of cached KV blocks that anybody may hit, in numbered batches, as long as the engine serves.

        Goes on behind the batch of number `start`, if that is remembered, else with a snapshot; 0 is the beginning. Who
        reads too slowly gets a snapshot instead of what was forgotten meanwhile. Raises `ConfigError` where the engine
        keeps no account of them (`cache_events`), `Unavailable` once it is over.
        """
        return self._cache.watch(start)

    # Inside ------------------------------------------------------------------------------------------

    def _serving(self) -> Intake:
        """The way in, while the engine takes requests."""
        if self._state == "ready" and self._intake is not None:
            return self._intake
        reasons = {
            "restarting": "the engine is being restarted",
            "draining": "the server is shutting down",
            "dead": "the engine is not running",
        }
        raise Unavailable(reasons.get(self._state, "the model is still loading"), retry_after=RETRY_LOADING)

    def _ended(self, stream: Stream, taken: Taken) -> None:
        self._running.ended(stream)
        for choice in stream.choices:
            taken.answered(choice.token_ids)

    def _draw_seed(self) -> int:
        return secrets.randbits(63) if self._random is None else self._random.getrandbits(63)

    def _teach(self, lesson: Learn) -> None:
        if self._state != "draining":
            self._serving()  # an engine that loads would never answer
        self._link.send(lesson)

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.tokenizer, self.facts.vocab_size, self.facts.eos_token_ids)

    def _serve(self, facts: EngineFacts) -> None:
        """From now on ready."""
        self._facts = facts
        self._memory = self._memory or PromptMemory(self.tokenizer)
        self._intake = Intake(self.tokenizer, self._memory, facts, max_choices=self.config.max_queued_requests)
        self._state = "ready"

    def _receive(self, message: Heard) -> None:
        self._heard = time.monotonic()
        match message:
            case Tokens(gained, stats):
                self._stats = stats
                self._running.deliver(gained)
            case Heartbeat(stats, steps):
                self._stats = stats or self._stats
                self._steps = steps or self._steps
            case CacheEvents():
                self._cache.hear(message)
            case Learnt():
                self._grammars.learnt(message)
            case Dropped(id):
                self._drops.answer(id, message)
            case Accepted(id):
                self._running.admitted(id, None)
            case Refused():
                self._running.admitted(message.id, as_error(message))
            case Loading(stage, done, total):
                if self._progress is not None:
                    self._progress(stage, done, total)
            case Ready():
                self._loaded(message)
            case Lost(error):
                self._lose(error)
            case Failed(error, config):
                self._fail(error, ConfigError if config else EngineFailed)

    def _loaded(self, ready: Ready) -> None:
        assert self._ready is not None
        if not self._ready.done():
            self._ready.set_result(ready)
        elif self._state == "restarting":
            self._restarts += 1
            self._serve(self.facts.taken_over(ready))

    def _lose(self, error: str) -> None:
        """Nobody is left waiting for this engine; the next one is being started."""
        if self._state == "ready":
            self._state = "restarting"
        self._error = error
        self._stats = EngineStats()
        self._cache.lost()
        self._leave_nobody_waiting(Unavailable("the engine died and is being restarted", retry_after=RETRY_LOADING))

    def _leave_nobody_waiting(self, failure: Unavailable) -> None:
        self._running.fail(failure)
        self._grammars.fail(failure)
        self._drops.fail(failure)

    def _fail(self, error: str, failure: type[TokenSpeedError] = EngineFailed) -> None:
        """From now on dead: nobody is left waiting, and a start ends with `failure`."""
        self._state = "dead"
        self._error = error
        self._leave_nobody_waiting(over := Unavailable("the engine is not running", retry_after=RETRY_LOADING))
        self._cache.end(over)
        if self._ready is not None:
            if not self._ready.done():
                self._ready.set_exception(failure(error))
            # Marks a failure that nobody awaits any more as seen.
            self._ready.cancelled() or self._ready.exception()


def _load_front(source: Source, config: EngineConfig) -> tuple[TextSide, ModelConfig]:
    text = load_text(source, tokenizer=config.tokenizer, chat_template=config.chat_template)
    return text, read_model_config(source)
