"""From an admitted request to its answer: one path for chat and completions, streamed or not."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from aiohttp import web

from tokenspeed.engine.stream import Stream
from tokenspeed.entrypoints.answers import Answer, Gathered, Usage
from tokenspeed.entrypoints.door import Door
from tokenspeed.entrypoints.errors import GenerationFailed, error_body
from tokenspeed.entrypoints.metrics import RequestTimes
from tokenspeed.entrypoints.schema import Delivery, checked_label
from tokenspeed.entrypoints.sse import DONE, EventStream
from tokenspeed.errors import RequestError
from tokenspeed.request import RequestOutput, SamplingParams
from tokenspeed.text.spans import Span

log = logging.getLogger(__name__)

Prompt = str | Sequence[int] | Sequence[Span]

QUEUED_OUTPUTS = 64
"""Outputs of a batch of prompts that may wait between the engine's streams and the client's."""

ARRIVED = web.RequestKey("arrived", float)
TENANT = web.RequestKey("tenant", str)
"""Keys of the request's storage, set before any route runs: the loop's clock, and who asks."""


@dataclass(frozen=True, slots=True)
class Generation:
    """What is asked of the engine. Choices are numbered prompt by prompt.

    `shows_completion` False hides what is generated: only the prompt and its log-probabilities are wanted.
    """

    prefix: str
    prompts: Sequence[Prompt]
    params: SamplingParams
    delivery: Delivery
    shows_completion: bool = True


MakeAnswer = Callable[[str, list[Stream]], Answer]


async def answer(
    request: web.Request, door: Door, generation: Generation, make_answer: MakeAnswer
) -> web.StreamResponse:
    """Admit every prompt, or raise before anything is sent; then stream or gather. Leaving aborts all."""
    delivery = generation.delivery
    label = delivery.label or checked_label(request.headers.get("X-Request-Id"), "X-Request-Id")
    id = f"{generation.prefix}-{uuid.uuid4().hex}"
    headers = {"X-Request-Id": label or id}
    door.log_ignored(id, delivery)
    streams: list[Stream] = []
    door.active[id] = (label, streams)
    try:
        for number, prompt in enumerate(generation.prompts):
            stream = await door.engine.submit(
                prompt,
                generation.params,
                request_id=f"{id}-{number}",
                cache_salt=_salt(request[TENANT], delivery.cache_salt),
                priority=delivery.priority,
            )
            streams.append(stream)
        run = _Run(door, generation, streams, request[ARRIVED])
        writer = make_answer(id, streams)
        if delivery.stream:
            return await _stream(request, door, run, writer, delivery, headers)
        return await _whole(run, writer, headers)
    finally:
        del door.active[id]
        for stream in streams:
            await stream.abort()


class _Run:
    """Iterates the outputs of all prompts, numbering choices and keeping the counts of the answer."""

    def __init__(self, door: Door, generation: Generation, streams: list[Stream], arrived: float) -> None:
        self.usage = Usage(prompt_tokens=sum(len(stream.prompt_token_ids) for stream in streams))
        self.num_choices = len(streams) * generation.params.n
        self._n = generation.params.n
        self._shows_completion = generation.shows_completion
        self._streams = streams
        self._metrics = door.metrics
        self._times = RequestTimes(door.metrics, arrived)
        self._clock = asyncio.get_running_loop().time

    def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(choice number, delta) until every choice ended. Raises when a choice ended with an error."""
        counted = self._of_one() if len(self._streams) == 1 else self._of_many()
        return counted if self._shows_completion else _without_completions(counted)

    async def _of_one(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        # Apart from `_of_many`, because a layer of generators costs 0.5 µs a token.
        async for output in self._streams[0]:
            self._count(0, output.index, output)
            yield output.index, output

    async def _of_many(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        async with contextlib.aclosing(_merged(self._streams)) as merged:
            async for prompt, output in merged:
                index = prompt * self._n + output.index
                self._count(prompt, index, output)
                yield index, output

    def _count(self, prompt: int, index: int, output: RequestOutput) -> None:
        if output.token_ids:
            self._times.tokens(index, len(output.token_ids), self._clock())
        if output.finish_reason is not None:
            self._finish(prompt, output)

    def _finish(self, prompt: int, output: RequestOutput) -> None:
        reason = output.finish_reason or "stop"
        self._times.finished(reason, self._clock())
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


async def _whole(run: _Run, writer: Answer, headers: dict[str, str]) -> web.Response:
    choices = [Gathered(index) for index in range(run.num_choices)]
    async with contextlib.aclosing(run.outputs()) as outputs:
        async for index, output in outputs:
            choices[index].add(output)
    body = writer.whole(choices, run.usage)
    return web.Response(body=body, content_type="application/json", headers=headers)


async def _stream(
    request: web.Request, door: Door, run: _Run, writer: Answer, delivery: Delivery, headers: dict[str, str]
) -> web.StreamResponse:
    """Events as they come. Once the headers are out, an error is one event and then the end, without [DONE]."""
    events = EventStream(request, door.limits, headers)
    await events.open()
    try:
        async with contextlib.aclosing(run.outputs()) as outputs:
            async for index, output in outputs:
                event = writer.event(index, output)
                if event and events.send(event):
                    await events.drain()
        if delivery.include_usage:
            events.send(writer.usage_event(run.usage))
        events.send(DONE)
        return await events.close()
    except RequestError as error:
        events.send(b"data: " + error_body(error) + b"\n\n")
        return await events.close()
    finally:
        events.stop_timer()


async def _merged(streams: list[Stream]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Outputs of all streams as they come, with the stream's number."""
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception | None] = asyncio.Queue(QUEUED_OUTPUTS)

    async def pump(number: int, stream: Stream) -> None:
        try:
            async for output in stream:
                await queue.put((number, output))
            await queue.put(None)
        except Exception as error:
            await queue.put(error)  # raised where the outputs are read

    tasks = [asyncio.create_task(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _without_completions(
    outputs: AsyncGenerator[tuple[int, RequestOutput], None],
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """One output a choice, with what is known of the prompt and nothing of what was generated."""
    first: dict[int, RequestOutput] = {}
    async with contextlib.aclosing(outputs):
        async for index, output in outputs:
            first.setdefault(index, output)
            if output.finish_reason is not None:
                yield (
                    index,
                    RequestOutput(
                        request_id=output.request_id,
                        index=output.index,
                        prompt_logprobs=first[index].prompt_logprobs,
                        finish_reason="length" if output.finish_reason == "stop" else output.finish_reason,
                        num_prompt_tokens=output.num_prompt_tokens,
                        num_cached_tokens=output.num_cached_tokens,
                    ),
                )


def _salt(tenant: str, salt: str) -> str:
    """The prefix cache's key space: tenants never share one, whatever salt they send."""
    return f"{tenant}:{salt}" if tenant or salt else ""
