"""The messages of a chat as the model's template gets them, whatever shape agents send them back in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenspeed.entrypoints.body import ARRAY, OBJECT, STRING, Fields, decode, describe
from tokenspeed.entrypoints.limits import MAX_CALLS, MAX_MESSAGES, MAX_PARTS
from tokenspeed.entrypoints.schema_tools import function_name
from tokenspeed.errors import InvalidRequest
from tokenspeed.text.parsers.repair import MAX_REPAIRED, arguments_object

Message = dict[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""Roles of this version and the role under which the template sees them."""

MESSAGE_HINTS = frozenset(
    {"annotations", "cache_control", "id", "index", "logprobs", "phase", "refusal", "status", "type"}
)
"""Fields of a message, or of a call in it, that clients send back and that have no effect."""

_PARTS_TEXT = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""By the types of a part that are text: the field that holds it."""


@dataclass(slots=True)
class MessageReader:
    """Reads one conversation. `unknown` names fields without effect, `repaired` what was put right.

    `root` is the field that holds it.
    """

    root: str = "messages"
    unknown: dict[str, None] = field(default_factory=dict)
    repaired: list[str] = field(default_factory=list)
    _unanswered: list[str] = field(default_factory=list)
    _num_calls: int = 0
    _repairable: int = MAX_REPAIRED

    def read(self, raw: bytes) -> list[Message]:
        """The checked messages, or `InvalidRequest` naming the first field at fault."""
        items = decode(raw, ARRAY, self.root) or []
        if not 1 <= len(items) <= MAX_MESSAGES:
            raise InvalidRequest(
                f"{self.root} must have 1 to {MAX_MESSAGES} entries, got {len(items)}", param=self.root
            )
        return [self._message(bytes(item), f"{self.root}[{index}]") for index, item in enumerate(items)]

    def _message(self, raw: bytes, name: str) -> Message:
        inner = decode(raw, OBJECT, name)
        if inner is None:
            raise InvalidRequest(f"{name} must be an object, got null", param=name)
        fields = Fields(inner, name + ".")
        role = _role(fields, name)
        for key in ("function_call", "audio", *(() if role == "assistant" else ("tool_calls",))):
            if (fields.raw(key) or b"[]") != b"[]":
                what = "belongs to assistant messages" if key == "tool_calls" else "is not supported by this version"
                raise InvalidRequest(f"{name}.{key} {what}", param=f"{name}.{key}")
        message: Message = {"role": ROLES[role]}
        for key in ("name", "reasoning_content"):
            if (value := fields.take(key, STRING)) is not None:
                message[key] = value
        if "reasoning_content" not in message and (reasoning := fields.take("reasoning", STRING)) is not None:
            message["reasoning_content"] = reasoning
        if role == "tool":
            message["tool_call_id"] = self._answered(fields.take("tool_call_id", STRING))
            message["content"] = self._content(fields, name, required=False) or ""
        elif role == "assistant" and (calls := self._calls(fields, name)):
            # Null, as OpenAI has it: templates tell a message that only calls from one that also speaks.
            message["content"] = self._content(fields, name, required=False) or None
            message["tool_calls"] = calls
        else:
            thought = role == "assistant" and "reasoning_content" in message
            message["content"] = self._content(fields, name, required=not thought) or ""
        self._note(fields, "")
        return message

    def _note(self, fields: Fields, inside: str) -> None:
        prefix = f"{self.root}[].{inside}"
        self.unknown.update((prefix + key, None) for key in fields.untaken() if key not in MESSAGE_HINTS)

    def _content(self, fields: Fields, name: str, *, required: bool, key: str = "content") -> str | None:
        """A string, or text parts joined; nothing is ever fetched. None where it is absent and not required."""
        where = f"{name}.{key}"
        raw = fields.raw(key)
        if raw is None or (raw == b"[]" and not required):
            if not required:
                return None
            raise InvalidRequest(f"{where} is required: a string or an array of text parts", param=where)
        if raw.startswith(b'"'):
            return decode(raw, STRING, where) or ""
        if not raw.startswith(b"["):
            raise InvalidRequest(
                f"{where} must be a string or an array of text parts, got {describe(raw, shows=False)}", param=where
            )
        parts = decode(raw, ARRAY, where) or []
        if not 1 <= len(parts) <= MAX_PARTS:
            raise InvalidRequest(f"{where} must have 1 to {MAX_PARTS} parts, got {len(parts)}", param=where)
        return "".join([self._part(bytes(part), f"{where}[{index}]") for index, part in enumerate(parts)])

    def _part(self, raw: bytes, name: str) -> str:
        parsed = decode(raw, OBJECT, name)
        if parsed is None:
            raise InvalidRequest(f"{name} must be an object, got null", param=name)
        inner = Fields(parsed, f"{name}.")
        kind = inner.take("type", STRING)
        if kind is None or kind not in _PARTS_TEXT:
            got = "nothing" if kind is None else describe(inner.raw("type") or b"", shows=True)
            raise InvalidRequest(
                f"{inner.name('type')} must be text: this model takes text only, got {got}", param=inner.name("type")
            )
        text = inner.take(key := _PARTS_TEXT[kind], STRING)
        if text is None:
            raise InvalidRequest(f"{inner.name(key)} is required", param=inner.name(key))
        self._note(inner, "content[].")
        return text

    def _calls(self, fields: Fields, name: str) -> list[dict[str, Any]]:
        """The calls of an assistant message, their arguments as objects."""
        items = fields.take("tool_calls", ARRAY) or []
        if len(items) > MAX_CALLS:
            raise InvalidRequest(
                f"{name}.tool_calls must have at most {MAX_CALLS} entries, got {len(items)}", param=f"{name}.tool_calls"
            )
        self._unanswered.clear()
        return [self._call(bytes(item), f"{name}.tool_calls[{index}]") for index, item in enumerate(items)]

    def _call(self, raw: bytes, name: str) -> dict[str, Any]:
        parsed = decode(raw, OBJECT, name)
        if parsed is None:
            raise InvalidRequest(f"{name} must be an object, got null", param=name)
        outer = Fields(parsed, f"{name}.")
        kind = outer.take("type", STRING)
        inner = outer.take("function", OBJECT)
        if inner is None or kind not in (None, "function"):
            raise InvalidRequest(f"{name} must be a call of type function", param=f"{name}.function")
        function = Fields(inner, f"{name}.function.")
        called = function_name(function)
        arguments = self._arguments(function.raw("arguments"), function.name("arguments"))
        made = self._made_call(outer.take("id", STRING), called, arguments)
        self._note(outer, "tool_calls[].")
        self._note(function, "tool_calls[].function.")
        return made

    def _made_call(self, id: str | None, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """A call that awaits its answer. A lost id is made anew, the same in every turn: the prompt stays the same."""
        id = id or f"functions.{name}:{self._num_calls}"
        self._num_calls += 1
        self._unanswered.append(id)
        return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}

    def _arguments(self, raw: bytes | None, where: str) -> dict[str, Any]:
        raw = raw or b'""'
        text = decode(raw, STRING, where) if raw.startswith(b'"') else raw.decode()
        arguments, repaired = arguments_object(text or "", self._repairable)
        if repaired:
            self.repaired.append(where)
            self._repairable -= len(text or "")
        return arguments

    def _answered(self, id: str | None) -> str:
        """The id of the call that a tool message answers: the oldest one without an answer if the client lost it."""
        if id is None:
            id = self._unanswered[0] if self._unanswered else ""
        if id in self._unanswered:
            self._unanswered.remove(id)
        return id


def _role(fields: Fields, name: str) -> str:
    role = fields.take("role", STRING)
    if role == "function":
        raise InvalidRequest(f"{name}: function messages are not supported; use tool", param=f"{name}.role")
    if role not in ROLES:
        got = "nothing" if role is None else describe(fields.raw("role") or b"", shows=True)
        raise InvalidRequest(f"{name}.role must be one of {', '.join(ROLES)}, got {got}", param=f"{name}.role")
    return role
