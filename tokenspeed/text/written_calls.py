"""The arguments of calls as the model wrote them, for when a client sends them back written in another way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from tokenspeed.text.parsers.events import CallArguments, CallBegun, CallEnded, Event
from tokenspeed.text.recent import Recent
from tokenspeed.text.written import written_object

MAX_BYTES = 16 << 20
ENTRY_BYTES = 300
"""What an entry takes beside its text."""


class WrittenCalls:
    """Calls of recent answers whose arguments are not written as a template would; bounded by bytes.

    A call is found by its tenant, id, name and the value of its arguments. Where ids repeat, the text that came first
    stays, for an earlier turn must not change.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._texts: Recent[bytes, str] = Recent(max_bytes, lambda _, text: 4 * len(text) + ENTRY_BYTES)

    def note(self, tenant: str, id: str, name: str, text: str) -> None:
        """A model has written a call; arguments that are no JSON object are nothing that a client could keep."""
        written = written_object(text)
        if written is None or written.written_as == json.dumps(written, ensure_ascii=False):
            return
        key = _key(tenant, id, name, written)
        if self._texts.get(key) is None:
            self._texts.put(key, written.written_as)

    def restored(self, messages: Sequence[Mapping[str, Any]], tenant: str) -> Sequence[Mapping[str, Any]]:
        """The messages, with the arguments of known calls as the model wrote them."""
        if not len(self._texts):
            return messages
        return [
            {**message, "tool_calls": [self._restored(call, tenant) for call in message["tool_calls"]]}
            if message.get("tool_calls")
            else message
            for message in messages
        ]

    def _restored(self, call: Mapping[str, Any], tenant: str) -> Mapping[str, Any]:
        function = call["function"]
        text = self._texts.get(_key(tenant, call["id"], function["name"], function["arguments"]))
        if text is None:
            return call
        return {**call, "function": {**function, "arguments": written_object(text)}}


class CallNotes:
    """Listens to the events of one answer and notes its calls."""

    def __init__(self, calls: WrittenCalls, tenant: str) -> None:
        self._calls = calls
        self._tenant = tenant
        self._open: dict[int, tuple[CallBegun, list[str]]] = {}

    def __call__(self, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, CallArguments):
                self._open[event.index][1].append(event.fragment)
            elif isinstance(event, CallBegun):
                self._open[event.index] = (event, [])
            elif isinstance(event, CallEnded):
                begun, fragments = self._open.pop(event.index)
                self._calls.note(self._tenant, begun.id, begun.name, "".join(fragments))


def _key(tenant: str, id: str, name: str, arguments: Mapping[str, Any]) -> bytes:
    value = json.dumps([tenant, id, name, arguments], ensure_ascii=False, sort_keys=True)
    return blake2b(value.encode("utf-8", "surrogatepass"), digest_size=16).digest()
