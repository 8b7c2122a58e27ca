"""One request on its way out: tokens come in a step at a time, deltas go to whoever iterates."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

from tokenspeed.batch import Finish
from tokenspeed.engine.lane import Gaps, Lane, Outlet, Pieces, Way
from tokenspeed.engine.messages import ChoiceTokens
from tokenspeed.errors import RequestError
from tokenspeed.request import FinishReason, RequestOutput, SamplingParams
from tokenspeed.text.stopping import NoText, OutputText
from tokenspeed.text.tokenizer import Tokenizer

_REASONS: dict[int, FinishReason] = {
    Finish.STOP: "stop",
    Finish.LENGTH: "length",
    Finish.ABORT: "abort",
    Finish.ERROR: "error",
}
NOT_FINITE_ERROR = "the model's values were not finite, or no token was allowed; this request was ended"


Take = Callable[[RequestOutput], bool]
"""Takes an output. True: no further one before there is room again."""

Ending = Callable[[str], bool]
"""Told the text of a choice, delta by delta: whether the choice ends with it."""


class Direct(Protocol):
    """What writes outputs down, where more text alone can also go straight to a connection (`lane`)."""

    outlet: Outlet
    gaps: Gaps

    def way(self, index: int) -> tuple[Way, float, int] | None:
        """How more text of a choice would be told, when its last token came, and the number of the next event.

        None where more text may be anything else than one event.
        """
        ...

    def passed(self, index: int, text: str, num_tokens: int, num_events: int, last: float) -> None:
        """What went straight since then, the last token at `last`. Told before anything else of the choice is taken."""
        ...


class Choice:
    """The state of one of a request's `n` continuations in the front end. `token_ids` are all that it has gained.

    Without `pieces` every token goes the long way.
    """

    def __init__(
        self,
        id: int,
        index: int,
        text: OutputText | NoText,
        eos: frozenset[int],
        ending: Ending | None,
        pieces: Pieces | None = None,
    ) -> None:
        self.id = id
        self.index = index
        self.text = text
        self.eos = eos
        self.ending = ending
        self.token_ids: list[int] = []
        self.num_tokens = 0
        self.num_cached = 0
        self.done = False
        self.lane = None if pieces is None or ending is not None else Lane(pieces, self.token_ids, text.stops)


class Stream(AsyncIterator[RequestOutput]):
    """The outputs of one admitted request; iterate, or await `each`, once. Leaving early, or cancelling, aborts it.

    `on_end` is told once, when nothing more will come; `abort_choice` and `finish_choice` reach the
    engine. Deltas of different choices are interleaved and tell themselves apart by `index`.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        choices: list[Choice],
        *,
        abort_choice: Callable[[int], None],
        finish_choice: Callable[[int, int], None],
        on_end: Callable[[Stream], None],
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.choices = choices
        self.queue_seconds: float | None = None
        self._abort_choice = abort_choice
        self._finish_choice = finish_choice
        self._on_end = on_end
        self._open = len(choices)
        self._pending: deque[RequestOutput] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._take: Take | None = None
        self._direct: Direct | None = None
        self._full = False
        self._gathering = False
        self._raised: Exception | None = None
        self._error: RequestError | None = None

    # From the engine -------------------------------------------------------------------------------

    def feed(self, choice: Choice, gained: ChoiceTokens) -> None:
        """Turn what one choice gained into a delta. Called once a step and choice."""
        if choice.done:
            return
        self._settle(choice)
        if self.queue_seconds is None:
            self.queue_seconds = gained.queue_seconds
        choice.num_cached = max(choice.num_cached, gained.cached)
        reason = _REASONS.get(gained.finish)
        delta = choice.text.feed(gained.token_ids, reason is not None)
        token_ids = gained.token_ids
        kept = len(token_ids)
        stop_reason: int | str | None = None
        if delta.stop is not None:
            kept = delta.num_tokens - choice.num_tokens
            stop_reason = delta.stop
            if reason is None:
                self._finish_choice(choice.id, delta.num_tokens)
            reason = "stop"
        elif gained.stop_id >= 0 and gained.stop_id not in choice.eos:
            stop_reason = gained.stop_id
        if reason is None and choice.ending is not None and choice.ending(delta.text):
            self._finish_choice(choice.id, choice.num_tokens + kept)
            reason = "stop"
        choice.num_tokens += kept
        if kept < len(token_ids):
            token_ids = token_ids[:kept]
        choice.token_ids += token_ids
        self._push(
            RequestOutput(
                request_id=self.request_id,
                index=choice.index,
                text=delta.text,
                token_ids=token_ids,
                logprobs=None if gained.logprobs is None else gained.logprobs[:kept],
                prompt_logprobs=gained.prompt_logprobs,
                finish_reason=reason,
                stop_reason=stop_reason,
                error=(gained.error or NOT_FINITE_ERROR) if reason == "error" else None,
                num_prompt_tokens=len(self.prompt_token_ids),
                num_cached_tokens=choice.num_cached,
                num_output_tokens=choice.num_tokens,
            )
        )
        if reason is not None:
            self._end_choice(choice)
        elif self._direct is not None and choice.lane is not None and (rest := choice.text.rest) is not None:
            found = self._direct.way(choice.index)
            if found is not None:
                way, last, number = found
                choice.lane.open(way, self._direct.outlet, self._direct.gaps, rest, last, number)

    def _settle(self, choice: Choice) -> None:
        """Nothing more goes straight; what did is known from now on as if it had been fed."""
        lane = choice.lane
        if lane is not None and lane.is_open and (count := lane.close()):
            assert self._direct is not None
            choice.num_tokens += count
            text = choice.text.passed(choice.token_ids[-count:])
            self._direct.passed(choice.index, text, count, lane.num_events, lane.last)

    def settle(self) -> None:
        """As if all that went straight had gone the long way."""
        for choice in self.choices:
            try:
                self._settle(choice)
            except Exception as error:
                self._raised = error  # by `each`, as in `_push`: who ends this stream must come to its end
                self._notify()

    def _stop_taking(self) -> None:
        self.settle()
        self._take = self._direct = None

    def fail(self, error: RequestError) -> None:
        """Nothing more can come: deltas already here are still delivered, then the iterator raises `error`."""
        self._error = error
        self.settle()
        for choice in self.choices:
            if not choice.done:
                self._abort_choice(choice.id)
                self._end_choice(choice)
        self._notify()

    def _push(self, output: RequestOutput) -> None:
        if self._take is None:
            self._pending.append(output)
            if not self._gathering:
                self._notify()
            return
        try:
            self._full = self._take(output)
        except Exception as error:
            self._raised = error  # by `each`, to whoever awaits it
        if self._full or self._raised is not None:
            self._stop_taking()
            self._notify()

    def _notify(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _end_choice(self, choice: Choice) -> None:
        choice.done = True
        self._open -= 1
        if self._open == 0:
            self._notify()
            self._on_end(self)

    def generated(self) -> list[int]:
        """What the first choice has gained so far: a list that goes on growing."""
        return self.choices[0].token_ids

    # To the caller ---------------------------------------------------------------------------------

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._open == 0:
                raise StopAsyncIteration
            await self._news()
        return self._pending.popleft()

    async def begun(self) -> bool:
        """Wait for the first output, without taking it. False if the request has ended; raises what ended it."""
        while not self._pending and self._open and self._error is None:
            await self._news()
        if self._error is not None:
            raise self._error
        return self._open > 0

    async def _news(self, pause: float = 0.0) -> None:
        """Wait for an output or an error, or for `pause` seconds or an end; cancelling aborts the request."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        self._gathering = pause > 0
        timer = loop.call_later(pause, self._notify) if self._gathering else None
        try:
            await self._waiter
        except asyncio.CancelledError:
            await self.abort()
            raise
        finally:
            self._gathering = False
            if timer is not None:
                timer.cancel()

    async def batch(self, pause: float = 0.0) -> list[RequestOutput]:
        """All outputs since the last call, at least one; none after the last. Instead of iterating.

        They first gather for `pause` seconds, unless everything ends before.
        """
        if pause > 0 and self._open and self._error is None:
            await self._news(pause)
        while not self._pending and self._open and self._error is None:
            await self._news()
        if not self._pending and self._error is not None:
            raise self._error
        outputs = list(self._pending)
        self._pending.clear()
        return outputs

    async def each(
        self, take: Take, room: Callable[[], Awaitable[None]], direct: Direct | None = None
    ) -> None:
        """Give every output to `take` at once when it is there; returns after the last. Instead of iterating.

        There is no wake-up of a task a token, which is a third of what a streamed token costs. When `take` says so
        `room` is awaited, and outputs wait. What `take` raises is raised here. Plain text may also go by `direct`.
        """
        loop = asyncio.get_running_loop()
        while True:
            while self._pending:
                if take(self._pending.popleft()):
                    await room()
            if self._error is not None:
                raise self._error
            if self._open == 0:
                return
            self._take, self._direct, self._waiter, self._full = take, direct, loop.create_future(), False
            try:
                await self._waiter
            except asyncio.CancelledError:
                self._stop_taking()
                await self.abort()
                raise
            finally:
                self._stop_taking()
            if self._raised is not None:
                raise self._raised
            if self._full:
                await room()

    async def abort(self) -> None:
        """End every choice that still runs; each gets a last output with reason abort. Idempotent."""
        self.settle()
        for choice in self.choices:
            if not choice.done:
                self._abort_choice(choice.id)
                self._push(
                    RequestOutput(
                        request_id=self.request_id,
                        index=choice.index,
                        finish_reason="abort",
                        num_prompt_tokens=len(self.prompt_token_ids),
                        num_cached_tokens=choice.num_cached,
                        num_output_tokens=choice.num_tokens,
                    )
                )
                self._end_choice(choice)

    async def aclose(self) -> None:
        """The caller is done with this stream: abort what runs and drop what was not read."""
        await self.abort()
        self._pending.clear()


def new_choice(
    id: int,
    index: int,
    tokenizer: Tokenizer,
    params: SamplingParams,
    eos: frozenset[int],
    ending: Ending | None,
    pieces: Pieces | None = None,
    texts: bool = True,
) -> Choice:
    """A choice with its own detokenizer and stop-string matcher; without them where nothing needs its text.

    `pieces` are those of the tokenizer.
    """
    if texts or params.stop or ending is not None:
        return Choice(id, index, OutputText(tokenizer, params, eos_token_ids=eos), eos, ending, pieces)
    return Choice(id, index, NoText(), eos, ending)
