"""Responses that run and, of those that ask for it, what is kept: bounded by number, bytes and age.

One store has the responses of one API key, so no client finds, or pushes out, those of another.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokenspeed.entrypoints.limits import Limits
from tokenspeed.entrypoints.schema_items import Item


class _Identity(msgspec.Struct):
    id: str


_identity = msgspec.json.Decoder(_Identity)


def item_id(item: Item) -> str:
    """The id of a stored item, nothing else of which is built."""
    return _identity.decode(item).id


@dataclass(slots=True)
class Running:
    """A response that is being generated. `body` is it as it was begun, `final` as it has `ended`, empty until then."""

    body: bytes
    items: tuple[Item, ...]
    keeps: bool
    final: bytes = b""
    ended: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True)
class Kept:
    """A response that ended: its whole body, the items of its conversation, and those that it added."""

    body: bytes
    items: tuple[Item, ...]
    output: tuple[Item, ...]
    expires: float


@dataclass(slots=True)
class _Held:
    item: Item
    id: str
    holders: int = 0


class ResponseStore:
    """All methods belong to the event loop but `conversation` and `item`, which change nothing."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._running: dict[str, Running] = {}
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._held: dict[int, _Held] = {}
        self._by_id: dict[str, Item] = {}
        self.num_bytes = 0

    def running(self, id: str) -> Running | None:
        """The response of this id if it is being generated."""
        return self._running.get(id)

    def kept(self, id: str) -> Kept | None:
        """The response of this id if it is kept; it then stays longest."""
        kept = self._valid(id)
        if kept is not None:
            kept.expires = self._clock() + self._limits.stored_seconds
            self._kept.move_to_end(id)
        return kept

    def conversation(self, id: str) -> tuple[Item, ...] | None:
        """See `schema_responses.Stored`."""
        kept = self._valid(id)
        return None if kept is None else kept.items + kept.output

    def item(self, id: str) -> Item | None:
        """See `schema_responses.Stored`."""
        return self._by_id.get(id)

    def begin(
        self, id: str, body: bytes, items: tuple[Item, ...], *, keeps: bool, continues: str | None = None
    ) -> None:
        """A response begins; `end` must follow. The one that it `continues` has thereby been used."""
        self._running[id] = Running(body, items, keeps)
        if continues is not None:
            self.kept(continues)
        self._shrink()

    def end(self, id: str, body: bytes, output: Sequence[dict[str, Any]]) -> None:
        """No more comes for this response. It is kept if that was asked for and nobody deleted it meanwhile."""
        running = self._running.pop(id)
        running.final = body
        running.ended.set()
        if running.keeps:
            said = tuple(msgspec.json.encode(item) for item in output)
            kept = Kept(body, running.items, said, self._clock() + self._limits.stored_seconds)
            self._kept[id] = kept
            self.num_bytes += len(body)
            for item in (*kept.items, *kept.output):
                self._hold(item)
        self._shrink()

    def delete(self, id: str) -> None:
        """Forget a kept response; one that runs is not kept when it ends."""
        if (running := self._running.get(id)) is not None:
            running.keeps = False
        if id in self._kept:
            self._drop(id)

    def _valid(self, id: str) -> Kept | None:
        kept = self._kept.get(id)
        return None if kept is None or kept.expires <= self._clock() else kept

    def _shrink(self) -> None:
        """Drop what is too old, then what was used longest ago, until the rest is within the limits."""
        now, limits = self._clock(), self._limits
        while self._kept and (
            next(iter(self._kept.values())).expires <= now
            or len(self._kept) > limits.max_stored_responses
            or self.num_bytes > limits.max_stored_bytes
        ):
            self._drop(next(iter(self._kept)))

    def _drop(self, id: str) -> None:
        kept = self._kept.pop(id)
        self.num_bytes -= len(kept.body)
        for item in (*kept.items, *kept.output):
            self._release(item)

    # Turns of one conversation share its items: an item counts once, and goes with the last response that has it.

    def _hold(self, item: Item) -> None:
        held = self._held.get(id(item))
        if held is None:
            held = self._held[id(item)] = _Held(item, item_id(item))
            self._by_id[held.id] = item
            self.num_bytes += len(item)
        held.holders += 1

    def _release(self, item: Item) -> None:
        held = self._held[id(item)]
        held.holders -= 1
        if not held.holders:
            del self._held[id(item)]
            self.num_bytes -= len(item)
            if self._by_id.get(held.id) is item:
                del self._by_id[held.id]


class ResponseStores:
    """The stores of all API keys."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._stores: dict[str, ResponseStore] = {}

    def of(self, tenant: str) -> ResponseStore:
        """The store of one API key."""
        store = self._stores.get(tenant)
        if store is None:
            store = self._stores[tenant] = ResponseStore(self._limits)
        return store
