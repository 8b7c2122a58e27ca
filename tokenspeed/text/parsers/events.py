"""What a model's text turns out to be: reasoning, content, tool calls, as they come."""

from __future__ import annotations

import msgspec


class Content(msgspec.Struct, frozen=True):
    """Text for the reader."""

    text: str


class Reasoning(msgspec.Struct, frozen=True):
    """Text of the model's thinking."""

    text: str


class CallBegun(msgspec.Struct, frozen=True):
    """A call of the tool `name`; `index` counts the calls of one answer from 0. `id` names it in later turns."""

    index: int
    id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True):
    """More of a call's arguments: all fragments of an index join to JSON text."""

    index: int
    fragment: str


class CallEnded(msgspec.Struct, frozen=True):
    """Nothing more comes for this call. One that was cut off has ended too, its JSON is then incomplete."""

    index: int


Event = Content | Reasoning | CallBegun | CallArguments | CallEnded
TextEvent = Content | Reasoning | CallArguments
