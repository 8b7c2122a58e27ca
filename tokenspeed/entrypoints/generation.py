"""From an admitted request to its answer: one path for every route that generates, streamed or not."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from aiohttp import web

from tokenspeed.engine.lane import Gaps, Outlet, Way
from tokenspeed.engine.stream import Ending, Stream, Take
from tokenspeed.entrypoints.answers import Answer, Gathered, Usage
from tokenspeed.entrypoints.door import Active, Door
from tokenspeed.entrypoints.errors import GenerationFailed
from tokenspeed.entrypoints.metrics import RequestTimes
from tokenspeed.entrypoints.schema import Delivery, checked_label
from tokenspeed.entrypoints.sse import EventStream
from tokenspeed.entrypoints.turns import ChatTurn, begin_turn
from tokenspeed.errors import RequestError
from tokenspeed.logs import REQUEST_ID
from tokenspeed.request import RequestOutput, SamplingParams
from tokenspeed.text.spans import Span

log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Span]

ARRIVED = web.RequestKey("arrived", float)
TENANT = web.RequestKey("tenant", str)
"""Keys of the request's storage, set before any route runs: the loop's clock, and who asks."""


LOGPROB_BYTES = 60
"""What one log-probability is in an answer; those of a prompt of 8,000 tokens with 20 alternatives each took 0.4 s."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What is asked of the engine. Choices are numbered prompt by prompt. The answer's id begins with `prefix`.

    `shows_completion` False hides what is generated: only the prompt and its log-probabilities are wanted.
    `make_ending` is `AsyncEngine.submit`'s. `turn` is there for chats.
    """

    prefix: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    delivery: Delivery
    shows_completion: bool = True
    make_ending: Callable[[], Ending] | None = None
    turn: ChatTurn | None = None


MakeAnswer = Callable[[str, list[Stream]], Answer]


async def _there_is_room() -> None:
    """For those who take everything."""


async def answer(
    request: web.Request, door: Door, generation: Generation, make_answer: MakeAnswer
) -> web.StreamResponse:
    """Admit every prompt, or raise before anything is sent; then stream or gather. Leaving aborts all."""
    delivery = generation.delivery
    label = delivery.label or checked_label(request.headers.get("X-Request-Id"), "X-Request-Id")
    id = f"{generation.prefix}{uuid.uuid4().hex}"
    headers = {"X-Request-Id": label or id}
    REQUEST_ID.set(label or id)
    door.log_ignored(id, delivery)
    streams: list[Stream] = []
    active = Active(label, [f"{id}-{number}" for number in range(len(generation.prompts))])
    door.active[id] = active
    try:
        for request_id, prompt in zip(active.request_ids, generation.prompts, strict=True):
            stream = await door.engine.submit(
                prompt,
                generation.params,
                request_id=request_id,
                cache_salt=_salt(request[TENANT], delivery.cache_salt),
                priority=delivery.priority,
                prompt_cache_key=delivery.prompt_cache_key,
                tps_floor=delivery.tps_floor,
                make_ending=generation.make_ending,
            )
            streams.append(stream)
            if active.aborted:
                await stream.abort()
        if generation.turn is not None:
            salt, session = _salt(request[TENANT], delivery.cache_salt), delivery.prompt_cache_key
            headers |= await begin_turn(request, door, generation.turn, streams[0], salt, session)
        run = _Run(door, generation, streams, request[ARRIVED])
        writer = make_answer(id, streams)
        if delivery.stream:
            return await _stream(request, door, run, writer, headers)
        return await _whole(door, run, writer, headers)
    finally:
        del door.active[id]
        for stream in streams:
            await stream.abort()


Consume = Callable[[int, RequestOutput, float], bool]
"""Takes an output of a choice, by its number, and the loop's time. True: no more before there is room again."""


class _Run:
    """Hands on the outputs of all prompts, numbering choices and keeping the counts of the answer."""

    def __init__(self, door: Door, generation: Generation, streams: list[Stream], arrived: float) -> None:
        self.usage = Usage(prompt_tokens=sum(len(stream.prompt_token_ids) for stream in streams))
        self.num_choices = len(streams) * generation.params.n
        self._n = generation.params.n
        self._shows_completion = generation.shows_completion
        self._streams = streams
        self._metrics = door.metrics
        self._times = RequestTimes(door.metrics, arrived)
        self._clock = asyncio.get_running_loop().time

    async def hand_on(
        self,
        consume: Consume,
        room: Callable[[], Awaitable[None]] = _there_is_room,
        straight: tuple[Answer, Outlet] | None = None,
    ) -> None:
        """Give every output to `consume` until every choice ended. Raises when a choice ended with an error.

        Plain text may go `straight`: by that outlet, as that answer would write it.
        """
        if not self._shows_completion:
            consume, straight = _without_completions(consume), None
        reads = [
            stream.each(
                self._taking(number, consume),
                room,
                None if straight is None else _Straight(*straight, self._metrics.gaps, self._times, number * self._n),
            )
            for number, stream in enumerate(self._streams)
        ]
        if len(reads) == 1:
            await reads[0]
            return
        reading = [asyncio.create_task(read) for read in reads]
        try:
            await asyncio.gather(*reading)
        finally:
            for task in reading:
                task.cancel()
            await asyncio.gather(*reading, return_exceptions=True)

    def settled(self, keep_alive: Callable[[], bytes]) -> Callable[[], bytes]:
        """The same, told by an answer that knows all that went straight."""

        def settle() -> bytes:
            for stream in self._streams:
                stream.settle()
            return keep_alive()

        return settle

    def _taking(self, prompt: int, consume: Consume) -> Take:
        first, times, clock = prompt * self._n, self._times, self._clock

        def take(output: RequestOutput) -> bool:
            now = clock()
            index = first + output.index
            if output.token_ids:
                times.tokens(index, len(output.token_ids), now)
            if output.finish_reason is not None:
                self._finish(prompt, output, now)
            return consume(index, output, now)

        return take

    def _finish(self, prompt: int, output: RequestOutput, now: float) -> None:
        reason = output.finish_reason or "stop"
        self._times.finished(reason, now)
        if reason == "error":
            raise GenerationFailed(output.error or "the engine ended this request with an error")
        if self._shows_completion:
            self.usage.completion_tokens += output.num_output_tokens
        if output.index == 0:
            # The first choice is admitted first: what the others find in the cache may be its own work.
            self.usage.cached_tokens += output.num_cached_tokens
            queued = self._streams[prompt].queue_seconds
            if queued is not None:
                self._metrics.queue.observe(queued)


class _Straight:
    """See `Direct`. The choices of one stream are `first` and those that follow it."""

    def __init__(self, answer: Answer, outlet: Outlet, gaps: Gaps, times: RequestTimes, first: int) -> None:
        self.outlet = outlet
        self.gaps = gaps
        self._answer = answer
        self._times = times
        self._first = first

    def way(self, index: int) -> tuple[Way, float, int] | None:
        index += self._first
        found = self._answer.way(index)
        return None if found is None else (found[0], self._times.last(index), found[1])

    def passed(self, index: int, text: str, num_tokens: int, num_events: int, last: float) -> None:
        index += self._first
        self._times.passed(index, last)
        self._answer.passed(index, text, num_tokens, num_events)


async def _whole(door: Door, run: _Run, writer: Answer, headers: dict[str, str]) -> web.Response:
    choices = [Gathered(index) for index in range(run.num_choices)]

    def gather(index: int, output: RequestOutput, _: float) -> bool:
        choices[index].add(output)
        return False

    await run.hand_on(gather)
    if writer.touches_others:
        body = writer.whole(choices, run.usage)
    else:
        body = await door.off_loop(
            LOGPROB_BYTES * sum(map(_num_logprobs, choices)), writer.whole, choices, run.usage
        )
    return web.Response(body=body, content_type="application/json", headers=headers)


def _num_logprobs(choice: Gathered) -> int:
    entries = [*choice.logprobs, *(choice.prompt_logprobs or ())]
    return sum(1 + len(entry.top_ids) for entry in entries if entry is not None)


async def _stream(
    request: web.Request, door: Door, run: _Run, writer: Answer, headers: dict[str, str]
) -> web.StreamResponse:
    """Events as they come. Once the headers are out, an error is one event and then the end."""
    events = EventStream(request, door.limits, headers, run.settled(writer.keep_alive))
    outlet = await events.open()

    def send(index: int, output: RequestOutput, now: float) -> bool:
        event = writer.event(index, output)
        return bool(event) and events.send(event, now)

    try:
        if opening := writer.opening():
            events.send(opening)
        await run.hand_on(send, events.drain, (writer, outlet))
        events.send(writer.closing(run.usage))
        return await events.close()
    except RequestError as error:
        events.send(writer.failure(error))
        return await events.close()
    finally:
        events.stop_timer()


def _without_completions(consume: Consume) -> Consume:
    """Passes on one output a choice, with what is known of the prompt and nothing of what was generated."""
    first: dict[int, RequestOutput] = {}

    def take(index: int, output: RequestOutput, now: float) -> bool:
        first.setdefault(index, output)
        if output.finish_reason is None:
            return False
        only = RequestOutput(
            request_id=output.request_id,
            index=output.index,
            prompt_logprobs=first[index].prompt_logprobs,
            finish_reason="length" if output.finish_reason == "stop" else output.finish_reason,
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
        )
        return consume(index, only, now)

    return take


def _salt(tenant: str, salt: str) -> str:
    """The prefix cache's key space: tenants never share one, whatever salt they send."""
    return f"{tenant}:{salt}" if tenant or salt else ""
