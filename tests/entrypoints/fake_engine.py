"""An engine in memory with `AsyncEngine`'s face: it repeats its prompt, token by token, byte by byte.

Deterministic: token i of an answer is token i of the prompt, over and over, for `max_tokens` tokens or until a
stop string or stop id. With a `script` the answer is that instead, and ends with it. Knobs let a test hold, slow
down, fail and count.
"""

from __future__ import annotations

import asyncio
import codecs
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from tokenspeed.config import EngineConfig
from tokenspeed.engine.messages import Dropped, EngineStats, PoolStats
from tokenspeed.engine.observe import StepHistograms
from tokenspeed.engine.stream import Direct, Ending, Take
from tokenspeed.errors import ContextLengthExceeded, InvalidRequest, QueueFull, RequestError, Unavailable
from tokenspeed.request import RequestOutput, SamplingParams, TokenLogprob
from tokenspeed.text.prompt_memory import MemoryStats
from tokenspeed.text.spans import Span
from tokenspeed.text.template import ChatTemplate

BOS, EOS, TURN, MARKER = 256, 257, 258, 259
VOCAB_SIZE = 260


class ByteTokenizer:
    """One token a byte, three control tokens above."""

    vocab_size = VOCAB_SIZE
    special_ids = frozenset({BOS, EOS, TURN, MARKER})
    control = MappingProxyType({"<|turn|>": TURN, "<|tool_call_begin|>": MARKER})

    def encode(self, text: str, *, add_special_tokens: bool = False, parse_special: bool = False) -> list[int]:
        assert not parse_special
        ids = list(text.encode())
        return [BOS, *ids] if add_special_tokens else ids

    def encode_spans(self, spans: list[Span]) -> list[int]:
        ids: list[int] = []
        for span in spans:
            if span.text == "<|turn|>" and not span.from_request:
                ids.append(TURN)
            else:
                ids.extend(span.text.encode())
        return ids

    def decode(self, ids: list[int], *, skip_special_tokens: bool = True) -> str:
        assert not skip_special_tokens
        return b"".join(self.token_bytes(token_id) for token_id in ids).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return {BOS: b"<bos>", EOS: b"<eos>", TURN: b"<|turn|>", MARKER: b"<|tool_call_begin|>"}[token_id]


class TurnTemplate:
    """`<|turn|>` before each message, which is role, colon, content. It has no place for tools."""

    knows_tools = False
    sources = MappingProxyType({"default": "{% for message in messages %}<|turn|>{{ message }}{% endfor %}"})

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        **kwargs: Any,
    ) -> list[Span]:
        if "fail" in kwargs:
            raise InvalidRequest("the chat template refused the conversation", param="messages")
        spans: list[Span] = []
        for message in messages:
            spans += [Span("<|turn|>", False), Span(f"{message['role']}:", False), Span(message["content"] or "", True)]
        if add_generation_prompt:
            spans += [Span("<|turn|>", False), Span("assistant:", False)]
        return spans


@dataclass
class Facts:
    model_name: str = "echo"
    architecture: str = "EchoForCausalLM"
    model_type: str = "echo"
    max_model_len: int = 512
    vocab_size: int = VOCAB_SIZE
    eos_token_ids: tuple[int, ...] = (EOS,)
    defaults: dict[str, float] = field(default_factory=dict)
    num_blocks: int = 100
    block_size: int = 64
    summary: str = "a fake engine"


@dataclass
class Health:
    state: str = "ready"
    error: str | None = None
    heartbeat_age: float = 0.0
    restarts: int = 0


class FakeStream:
    def __init__(
        self,
        engine: FakeEngine,
        request_id: str,
        ids: list[int],
        params: SamplingParams,
        make_ending: Callable[[], Ending] | None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = ids
        self.queue_seconds: float | None = 0.001
        self.params = params
        self._endings = [make_ending() for _ in range(params.n)] if make_ending is not None else None
        self._engine = engine
        self._outputs: asyncio.Queue[RequestOutput | RequestError] = asyncio.Queue()
        self._open = set(range(params.n))
        self._generated: list[int] = []
        self._task = asyncio.create_task(self._generate())

    def generated(self) -> list[int]:
        return self._generated

    async def each(self, take: Take, room: Callable[[], Awaitable[None]], direct: Direct | None = None) -> None:
        async for output in self:
            if take(output):
                await room()

    def settle(self) -> None:
        """Nothing goes straight here."""

    def __aiter__(self) -> FakeStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if not self._open and self._outputs.empty():
            raise StopAsyncIteration
        try:
            output = await self._outputs.get()
        except asyncio.CancelledError:
            await self.abort()
            raise
        if isinstance(output, RequestError):
            raise output
        return output

    async def abort(self) -> None:
        if self._open:
            self._engine.aborted.append(self.request_id)
            self._task.cancel()
            for index in sorted(self._open):
                self._put(index, finish_reason="abort")
            self._end()

    async def _generate(self) -> None:
        engine, params = self._engine, self.params
        script = engine.script
        budget = params.max_tokens or (64 if script is None else len(script) + 1)
        texts = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(params.n)]
        shown = [""] * params.n
        await engine.gate.wait()
        for number in range(budget):
            if engine.delay:
                await asyncio.sleep(engine.delay)
            for index in sorted(self._open):
                if engine.fail_after == number:
                    self._put(index, finish_reason="error", error="the model produced values that are not finite")
                    self._open.discard(index)
                    continue
                if engine.die_after == number:
                    self._outputs.put_nowait(Unavailable("the engine is not running", retry_after=5))
                    self._end()
                    return
                if script is None:
                    token_id = self.prompt_token_ids[number % len(self.prompt_token_ids)]
                else:
                    token_id = script[number] if number < len(script) else EOS
                hidden = token_id in ByteTokenizer.special_ids and token_id not in params.shown_special_ids
                data = b"" if hidden else ByteTokenizer().token_bytes(token_id)
                text = texts[index].decode(data, number == budget - 1)
                shown[index] += text
                stop = next((stop for stop in params.stop if stop in shown[index]), None)
                reason = "stop" if stop else "length" if number == budget - 1 else None
                if script is not None and token_id == EOS:
                    reason = "stop"
                if self._endings is not None and self._endings[index](text):
                    reason = "stop"
                if token_id in params.stop_token_ids:
                    reason, stop = "stop", token_id  # type: ignore[assignment]
                self._put(
                    index,
                    text="" if stop and isinstance(stop, str) and len(stop) == 1 else text,
                    token_ids=[token_id],
                    logprobs=None if params.logprobs is None else [logprob(token_id, params.logprobs)],
                    prompt_logprobs=self._prompt_logprobs() if number == 0 else None,
                    finish_reason=reason,
                    stop_reason=stop,
                    num_output_tokens=number + 1,
                )
                if reason is not None:
                    self._open.discard(index)
            if not self._open:
                break
        self._end()

    def _prompt_logprobs(self) -> list[TokenLogprob | None] | None:
        k = self.params.prompt_logprobs
        if k is None or len(self.prompt_token_ids) == 1:
            return None
        return [None, *(logprob(token_id, k) for token_id in self.prompt_token_ids[1:])]

    def _put(self, index: int, **values: Any) -> None:
        self._engine.generated += len(values.get("token_ids", ()))
        self._generated += values.get("token_ids", ()) if index == 0 else ()
        self._outputs.put_nowait(
            RequestOutput(
                request_id=self.request_id,
                index=index,
                num_prompt_tokens=len(self.prompt_token_ids),
                num_cached_tokens=self._engine.cached,
                **values,
            )
        )

    def _end(self) -> None:
        self._open.clear()
        self._engine.streams.discard(self)
        if not self._engine.streams:
            self._engine.idle.set()


def logprob(token_id: int, k: int) -> TokenLogprob:
    top = tuple((token_id + step) % 256 for step in range(k))
    return TokenLogprob(token_id, -0.5, 1, top, tuple(-0.5 - step for step in range(k)))


class FakeEngine:
    def __init__(self, **facts: Any) -> None:
        self.config = EngineConfig()
        self.facts = Facts(**facts)
        self.tokenizer = ByteTokenizer()
        self.template: TurnTemplate | ChatTemplate | None = TurnTemplate()
        self.script: list[int] | None = None
        self.state = Health()
        self.delay = 0.0
        self.cached = 0
        self.generated = 0
        self.fail_after: int | None = None
        self.die_after: int | None = None
        self.queue_limit = 1000
        self.refusal: RequestError | None = None
        self.refusals: dict[str, int] = {}
        self.steps = StepHistograms()
        self.gate = asyncio.Event()
        self.gate.set()
        self.admission = asyncio.Event()
        self.admission.set()
        self.idle = asyncio.Event()
        self.idle.set()
        self.streams: set[FakeStream] = set()
        self.submitted: list[dict[str, Any]] = []
        self.aborted: list[str] = []
        self.stopped_with: list[float] = []

    async def start(self) -> None:
        self.state = Health()

    async def stop(self, grace: float = 30.0) -> None:
        self.state = Health("draining")
        self.stopped_with.append(grace)
        try:
            await asyncio.wait_for(self.idle.wait(), grace)
        except TimeoutError:
            for stream in list(self.streams):
                await stream.abort()
        self.state = Health("dead")

    def health(self) -> Health:
        return self.state

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.streams),
            blocks_total=100,
            generation_tokens=self.generated,
            sessions_resident=3,
            sessions_waiting=1,
            refusals=self.refusals,
            streams_below_floor=2,
            pools=[PoolStats(2, 0, 50, 10), PoolStats(1, 4, 50, 40)],
        )

    def memory_stats(self) -> MemoryStats:
        return MemoryStats(bytes=1000, tokens_encoded=30, tokens_known=50, tokens_generated=20)

    def step_histograms(self) -> StepHistograms:
        return self.steps

    async def submit(
        self,
        prompt: Any,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        cache_salt: str = "",
        priority: int = 0,
        prompt_cache_key: str = "",
        tps_floor: float | None = None,
        make_ending: Callable[[], Ending] | None = None,
    ) -> FakeStream:
        if self.state.state != "ready":
            raise Unavailable("not ready", retry_after=5)
        param = "prompt"
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        elif isinstance(prompt[0], Span):
            ids, param = self.tokenizer.encode_spans(prompt), "messages"
        else:
            ids = list(prompt)
        params.check(VOCAB_SIZE)
        room = self.facts.max_model_len - len(ids)
        if room < (params.max_tokens or 1):
            raise ContextLengthExceeded(
                limit=self.facts.max_model_len, prompt=len(ids), completion=params.max_tokens or 1, param=param
            )
        if len(self.streams) >= self.queue_limit:
            raise QueueFull("too many requests are waiting; try again later", code="queue_full", retry_after=2)
        if self.refusal is not None:
            raise self.refusal
        self.submitted.append(
            {
                "ids": ids,
                "params": params,
                "id": request_id,
                "salt": cache_salt,
                "priority": priority,
                "key": prompt_cache_key,
                "floor": tps_floor,
            }
        )
        stream = FakeStream(self, request_id or uuid.uuid4().hex, ids, params, make_ending)
        self.streams.add(stream)
        self.idle.clear()
        await self.admission.wait()
        return stream

    async def drop_cached(self) -> Dropped:
        return Dropped(0, num_blocks=3, num_held=len(self.streams))

    async def abort(self, request_id: str) -> bool:
        found = [stream for stream in self.streams if stream.request_id == request_id]
        for stream in found:
            await stream.abort()
        return bool(found)
