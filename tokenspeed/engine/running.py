"""The requests in progress: whose tokens a message of the engine has, who waits for an admission, who bears a label."""

from __future__ import annotations

import asyncio
import logging

from tokenspeed.engine.lane import Lane, carry
from tokenspeed.engine.messages import ChoiceTokens
from tokenspeed.engine.stream import Choice, Stream
from tokenspeed.errors import InternalError, RequestError

log = logging.getLogger(__name__)


class Running:
    """All streams of one engine that have not ended. `idle` is set while there are none."""

    def __init__(self) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self._choices: dict[int, tuple[Stream, Choice]] = {}
        self._lanes: dict[int, Lane] = {}
        self._admissions: dict[int, asyncio.Future[None]] = {}
        self._labels: dict[str, set[Stream]] = {}

    def add(self, stream: Stream) -> list[asyncio.Future[None]]:
        """Make a stream known before its choices are sent; gives one admission to await a choice."""
        self.idle.clear()
        self._labels.setdefault(stream.request_id, set()).add(stream)
        admitted: list[asyncio.Future[None]] = []
        for choice in stream.choices:
            self._choices[choice.id] = (stream, choice)
            if choice.lane is not None:
                self._lanes[choice.id] = choice.lane
            admission = self._admissions[choice.id] = asyncio.get_running_loop().create_future()
            admission.add_done_callback(lambda future: future.cancelled() or future.exception())  # some nobody awaits
            admitted.append(admission)
        return admitted

    def labelled(self, label: str) -> list[Stream]:
        """The streams with this label."""
        return list(self._labels.get(label, ()))

    def streams(self) -> list[Stream]:
        """All of them."""
        return list({stream: None for stream, _ in self._choices.values()})

    def admitted(self, id: int, refusal: RequestError | None) -> None:
        """The engine has queued a choice, or refused it."""
        future = self._admissions.pop(id, None)
        if future is None or future.done():
            return
        if refusal is None:
            future.set_result(None)
        else:
            future.set_exception(refusal)

    def deliver(self, gained: list[ChoiceTokens]) -> None:
        """Hand each choice what it gained. What goes wrong in one request's text ends that request alone."""
        for item in carry(gained, self._lanes, asyncio.get_running_loop().time(), self._failed):
            entry = self._choices.get(item.id)
            if entry is None:
                continue
            stream, choice = entry
            try:
                stream.feed(choice, item)
            except Exception:
                self._failed(item)

    def _failed(self, item: ChoiceTokens) -> None:
        stream, _ = self._choices[item.id]
        log.exception("request %s is ended", stream.request_id)
        stream.fail(InternalError("the server could not turn this request's tokens into text"))

    def fail(self, error: RequestError) -> None:
        """Nothing more comes from this engine: nobody is left waiting."""
        for future in self._admissions.values():
            if not future.done():
                future.set_exception(error)
        for stream in self.streams():
            stream.fail(error)

    def ended(self, stream: Stream) -> None:
        """Nothing more will come for a stream."""
        for choice in stream.choices:
            self._choices.pop(choice.id, None)
            self._lanes.pop(choice.id, None)
            pending = self._admissions.pop(choice.id, None)
            if pending is not None and not pending.done():
                pending.set_result(None)  # whoever submits it finds the stream ended
        labelled = self._labels.get(stream.request_id)
        if labelled is not None:
            labelled.discard(stream)
            if not labelled:
                del self._labels[stream.request_id]
        if not self._choices:
            self.idle.set()
