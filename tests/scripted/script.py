"""A model that says what a script says: which answer a prompt gets.

A script is JSON: scenes, tried in order. A scene begins with the first message of the prompt that `when` matches; its
turn is the number of the assistant's messages since then, and its last answer repeats. `finds` are expressions with
one group that is looked for in the whole prompt; `$name` in an answer stands for what it found, as a real model would
copy a path from its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import msgspec

NO_SCENE = "No scene of the script fits this prompt."


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call that the model makes."""

    name: str
    arguments: dict[str, Any] = {}


class Reply(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One answer."""

    text: str = ""
    calls: tuple[ToolCall, ...] = ()
    thinking: str = ""

    def filled(self, found: Mapping[str, str]) -> Reply:
        """The same with its `$names` put in."""
        return msgspec.convert(_filled(msgspec.to_builtins(self), found), Reply)


class Scene(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The answers of one conversation."""

    when: str
    turns: tuple[Reply, ...]
    finds: dict[str, str] = {}


class Turn(msgspec.Struct, frozen=True):
    """A message of a prompt as the template has framed it."""

    role: str
    text: str


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`name` is shown in the log."""

    name: str
    scenes: tuple[Scene, ...]

    @classmethod
    def read(cls, path: Path) -> Script:
        return msgspec.json.decode(path.read_bytes(), type=cls)

    def reply(self, prompt: list[Turn]) -> tuple[str, Reply]:
        """The answer to a prompt whose last turn is the assistant's, still empty, and where in the script it stands."""
        for number, scene in enumerate(self.scenes):
            begun = next((at for at, turn in enumerate(prompt) if re.search(scene.when, turn.text, re.DOTALL)), None)
            if begun is None:
                continue
            turn = sum(message.role == "assistant" for message in prompt[begun + 1 : -1])
            where = f"scene {number + 1}, turn {turn + 1} of {len(scene.turns)}"
            return where, scene.turns[min(turn, len(scene.turns) - 1)].filled(_found(scene.finds, prompt))
        return "no scene", Reply(NO_SCENE)


def _found(finds: Mapping[str, str], prompt: list[Turn]) -> dict[str, str]:
    matches = {
        name: next((found for turn in prompt if (found := re.search(expression, turn.text))), None)
        for name, expression in finds.items()
    }
    return {name: match[1] for name, match in matches.items() if match is not None}


def _filled(value: Any, found: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return Template(value).safe_substitute(found)
    if isinstance(value, dict):
        return {key: _filled(inner, found) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(inner, found) for inner in value]
    return value
