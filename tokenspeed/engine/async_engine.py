"""`AsyncEngine`: the programmatic face. Text and stop strings here, tokens in the engine behind a link."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal, Self

import msgspec
import numpy as np

from tokenspeed.checkpoint.config import ModelConfig, read_model_config
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.config import EngineConfig
from tokenspeed.engine.daemon import in_daemon_thread
from tokenspeed.engine.intake import EngineFacts, Intake, Prompt
from tokenspeed.engine.link import EngineLink, InProcessLink, ProcessLink
from tokenspeed.engine.messages import (
    Abort,
    Accepted,
    ChoiceTokens,
    EngineStats,
    Failed,
    FinishAt,
    FromEngine,
    Heartbeat,
    Loading,
    Ready,
    Refused,
    Submit,
    Tokens,
)
from tokenspeed.engine.stream import Choice, Stream, new_choice
from tokenspeed.errors import (
    ConfigError,
    InternalError,
    InvalidRequest,
    QueueFull,
    RequestError,
    TokenSpeedError,
    Unavailable,
)
from tokenspeed.request import RequestOutput, SamplingParams
from tokenspeed.text.load import TextSide, load_text
from tokenspeed.text.template import ChatTemplate
from tokenspeed.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

State = Literal["loading", "ready", "draining", "dead"]
Progress = Callable[[str, int, int], None]

RETRY_LOADING = 5


@dataclass(frozen=True, slots=True)
class Health:
    """`heartbeat_age` is in seconds since the engine was last heard of."""

    state: State
    error: str | None
    heartbeat_age: float


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
        self._stats = EngineStats()
        self._ready: asyncio.Future[Ready] | None = None
        self._text: TextSide | None = None
        self._facts: EngineFacts | None = None
        self._intake: Intake | None = None
        self._next_id = 1
        self._choices: dict[int, tuple[Stream, Choice]] = {}
        self._admissions: dict[int, asyncio.Future[None]] = {}
        self._labels: dict[str, set[Stream]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
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
        self._facts = EngineFacts(
            model_name=source.name,
            max_model_len=ready.max_model_len,
            vocab_size=model.vocab_size,
            eos_token_ids=model.eos_token_ids,
            defaults=model.generation_defaults,
            num_blocks=ready.num_blocks,
            block_size=ready.block_size,
            summary=ready.summary,
        )
        self._intake = Intake(text.tokenizer, self._facts, max_choices=self.config.max_queued_requests)
        self._state = "ready"

    async def stop(self, grace: float = 30.0) -> None:
        """Refuse new requests, let admitted ones end within `grace` seconds, abort the rest, end the engine."""
        if self._state in ("loading", "ready"):
            self._state = "draining"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace)
        for stream in [entry[0] for entry in self._choices.values()]:
            await stream.abort()
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
        return Health(self._state, self._error, time.monotonic() - self._heard)

    def stats(self) -> EngineStats:
        """The engine's counters as of its last message, at most one heartbeat old."""
        return self._stats

    # Requests ----------------------------------------------------------------------------------------

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        priority: int = 0,
    ) -> Stream:
        """Check a request whole and queue it, or raise a `RequestError`; nothing has been streamed then.

        `request_id` is a label for the caller: it need not be unique. Prefix-cache hits are shared only
        between equal `cache_salt`s. Lower `priority` goes first.
        """
        if not -(2**31) <= priority < 2**31:
            raise InvalidRequest(f"priority must fit a signed 32-bit integer, got {priority}", param="priority")
        salt = _utf8(cache_salt)
        ids, params = await self._serving().take(prompt, params)
        self._serving()
        seed = params.seed if params.seed is not None else self._draw_seed()
        eos = frozenset() if params.ignore_eos else frozenset(self.facts.eos_token_ids)
        stream = Stream(
            request_id or f"req-{uuid.uuid4().hex}",
            ids,
            [new_choice(self._take_id(), index, self.tokenizer, params, eos) for index in range(params.n)],
            abort_choice=lambda id: self._link.send(Abort(id)),
            finish_choice=lambda id, tokens: self._link.send(FinishAt(id, tokens)),
            on_end=self._ended,
        )
        raw = np.asarray(ids, dtype="<i4").tobytes()
        encoded = msgspec.Raw(msgspec.msgpack.encode(params))
        admitted = self._register(stream)
        try:
            for choice in stream.choices:
                # The choices of a seeded request differ, and each is reproducible by itself.
                own = (seed + choice.index) % 2**63
                self._link.send(
                    Submit(id=choice.id, prompt=raw, params=encoded, seed=own, salt=salt, priority=priority)
                )
            for outcome in await asyncio.gather(*admitted, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
        except BaseException:
            await stream.aclose()
            raise
        return stream

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Submit and iterate the deltas. Leaving the loop early, or cancelling its task, aborts the request."""
        stream = await self.submit(
            prompt, params or SamplingParams(), request_id=request_id, cache_salt=cache_salt, priority=priority
        )
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    async def abort(self, request_id: str) -> bool:
        """Abort every running request with this label; False if there is none."""
        streams = list(self._labels.get(request_id, ()))
        for stream in streams:
            await stream.abort()
        return bool(streams)

    # Inside ------------------------------------------------------------------------------------------

    def _serving(self) -> Intake:
        """The way in, while the engine takes requests."""
        if self._state == "ready" and self._intake is not None:
            return self._intake
        reasons = {"draining": "the server is shutting down", "dead": "the engine is not running"}
        raise Unavailable(reasons.get(self._state, "the model is still loading"), retry_after=RETRY_LOADING)

    def _register(self, stream: Stream) -> list[asyncio.Future[None]]:
        """Make a stream known before its choices are sent; gives one admission to await a choice."""
        self._idle.clear()
        self._labels.setdefault(stream.request_id, set()).add(stream)
        admitted: list[asyncio.Future[None]] = []
        for choice in stream.choices:
            self._choices[choice.id] = (stream, choice)
            admitted.append(asyncio.get_running_loop().create_future())
            self._admissions[choice.id] = admitted[-1]
        return admitted

    def _admitted(self, id: int, refusal: RequestError | None) -> None:
        future = self._admissions.pop(id, None)
        if future is None or future.done():
            return
        if refusal is None:
            future.set_result(None)
        else:
            future.set_exception(refusal)

    def _draw_seed(self) -> int:
        return secrets.randbits(63) if self._random is None else self._random.getrandbits(63)

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def _ended(self, stream: Stream) -> None:
        for choice in stream.choices:
            self._choices.pop(choice.id, None)
            pending = self._admissions.pop(choice.id, None)
            if pending is not None and not pending.done():
                pending.set_result(None)  # whoever submits it finds the stream ended
        labelled = self._labels.get(stream.request_id)
        if labelled is not None:
            labelled.discard(stream)
            if not labelled:
                del self._labels[stream.request_id]
        if not self._choices:
            self._idle.set()

    def _receive(self, message: FromEngine) -> None:
        self._heard = time.monotonic()
        match message:
            case Tokens(gained, stats):
                self._stats = stats
                self._deliver(gained)
            case Heartbeat(stats):
                if stats is not None:
                    self._stats = stats
            case Accepted(id):
                self._admitted(id, None)
            case Refused():
                self._admitted(message.id, _refusal(message))
            case Loading(stage, done, total):
                if self._progress is not None:
                    self._progress(stage, done, total)
            case Ready():
                assert self._ready is not None
                if not self._ready.done():
                    self._ready.set_result(message)
            case Failed(error, config):
                assert self._ready is not None
                if not self._ready.done():
                    self._ready.set_exception(ConfigError(error) if config else EngineFailed(error))
                self._fail(error)

    def _deliver(self, gained: list[ChoiceTokens]) -> None:
        for item in gained:
            entry = self._choices.get(item.id)
            if entry is None:
                continue
            stream, choice = entry
            try:
                stream.feed(choice, item)
            except Exception:
                # What goes wrong in one request's text ends that request, never its neighbours.
                log.exception("request %s is ended", stream.request_id)
                stream.fail(InternalError("the server could not turn this request's tokens into text"))

    def _fail(self, error: str) -> None:
        """From now on dead: nobody is left waiting."""
        self._state = "dead"
        self._error = error
        failure = Unavailable("the engine is not running", retry_after=RETRY_LOADING)
        for future in self._admissions.values():
            if not future.done():
                future.set_exception(failure)
        for stream in {entry[0] for entry in self._choices.values()}:
            stream.fail(failure)
        if self._ready is not None:
            if not self._ready.done():
                self._ready.set_exception(EngineFailed(error))
            # Marks a failure that nobody awaits any more as seen.
            self._ready.cancelled() or self._ready.exception()


def _load_front(source: Source, config: EngineConfig) -> tuple[TextSide, ModelConfig]:
    text = load_text(source, tokenizer=config.tokenizer, chat_template=config.chat_template)
    return text, read_model_config(source)


def _utf8(salt: str) -> bytes:
    try:
        return salt.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("cache_salt is no valid Unicode", param="cache_salt") from error


def _refusal(message: Refused) -> RequestError:
    match message.reason:
        case "QUEUE_FULL":
            return QueueFull("too many requests are waiting; try again later", retry_after=message.retry_after)
        case "TOO_LONG_FOR_CACHE":
            return InvalidRequest("the prompt does not fit the server's KV cache", param="prompt")
        case "INVALID":
            return InvalidRequest(f"the engine refused the request: {message.detail}")
        case reason:
            return InvalidRequest(f"the engine refused the request: {reason.lower()}", param="prompt")
