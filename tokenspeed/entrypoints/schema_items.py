"""The input items of a response request as the messages of a chat, whatever shape agents send them back in."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from tokenspeed.entrypoints.body import ARRAY, OBJECT, STRING, Fields, decode, describe
from tokenspeed.entrypoints.limits import MAX_CALLS, MAX_MESSAGES, MAX_PARTS
from tokenspeed.entrypoints.schema import Model, check_text_fits
from tokenspeed.entrypoints.schema_messages import ROLES, Message, MessageReader
from tokenspeed.entrypoints.schema_tools import function_name
from tokenspeed.errors import InvalidRequest

ITEM_ROLES = ("user", "assistant", "system", "developer")
ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning", "item_reference")

SKIPPED_ITEMS = frozenset(
    {
        "additional_tools",
        "apply_patch_call",
        "apply_patch_call_output",
        "code_interpreter_call",
        "compaction",
        "compaction_trigger",
        "computer_call",
        "computer_call_output",
        "configuration_update",
        "custom_tool_call",
        "custom_tool_call_output",
        "file_search_call",
        "image_generation_call",
        "local_shell_call",
        "local_shell_call_output",
        "mcp_approval_request",
        "mcp_approval_response",
        "mcp_call",
        "mcp_list_tools",
        "program",
        "program_output",
        "shell_call",
        "shell_call_output",
        "tool_search_call",
        "tool_search_output",
        "web_search_call",
    }
)
"""Items of tools that this server does not offer: a history from elsewhere has them. Left out and named in the log."""

_TYPELESS = {"role": "message", "id": "item_reference"}
"""What an item without a type is, by a field that it has."""

_ID_PREFIXES = {"message": "msg_", "function_call": "fc_", "function_call_output": "fco_", "reasoning": "rs_"}

Item = bytes
"""The JSON text of one item."""


def new_id(kind: str) -> str:
    """An id for an item of this type."""
    return f"{_ID_PREFIXES.get(kind, 'item_')}{uuid.uuid4().hex}"


@dataclass(slots=True)
class ItemReader(MessageReader):
    """Reads items into `messages`, one after the other; whatever an assistant does in one turn is one message.

    `find` gives the item that a reference means; all that are meant must fit the context of `model` together. With
    `keeps`, `context` has the items read, each with an id.
    """

    root: str = "input"
    find: Callable[[str], Item | None] = field(kw_only=True)
    keeps: bool = field(kw_only=True)
    model: Model = field(kw_only=True)
    messages: list[Message] = field(default_factory=list)
    context: list[Item] = field(default_factory=list)
    _turn: Message | None = None
    _num_bytes_meant: int = 0

    def instruct(self, text: str) -> None:
        """System text that stands before everything."""
        self.messages.append({"role": "system", "content": text})

    def recall(self, items: Iterable[Item], name: str) -> None:
        """Items of an earlier response, named in errors by the field that means them."""
        for item in items:
            self._item(item, name, known=True)

    def take(self, raw: bytes) -> None:
        """The `input` of a request: a string, which is a user's message, or items."""
        if raw.startswith(b'"'):
            text = decode(raw, STRING, self.root)
            self._item(msgspec.json.encode({"type": "message", "role": "user", "content": text}), self.root)
            return
        if not raw.startswith(b"["):
            got = describe(raw, shows=False)
            raise InvalidRequest(f"{self.root} must be a string or an array of items, got {got}", param=self.root)
        items = decode(raw, ARRAY, self.root) or []
        if len(items) > MAX_MESSAGES:
            raise InvalidRequest(
                f"{self.root} must have at most {MAX_MESSAGES} items, got {len(items)}", param=self.root
            )
        for index, item in enumerate(items):
            self._item(bytes(item), f"{self.root}[{index}]")

    def done(self) -> list[Message]:
        """All messages; instructions and the system messages that follow them are one, as templates expect.

        Nothing may be read afterwards.
        """
        for turn in self.messages:
            if turn["role"] == "assistant":
                turn["content"] = "".join(turn["content"]) or (None if "tool_calls" in turn else "")
                if "reasoning_content" in turn:
                    turn["reasoning_content"] = "".join(turn["reasoning_content"])
        count = next((i for i, message in enumerate(self.messages) if message["role"] != "system"), len(self.messages))
        head = [message["content"] for message in self.messages[:count] if message["content"]]
        merged: list[Message] = [{"role": "system", "content": "\n\n".join(head)}] if count else []
        messages = merged + self.messages[count:]
        if not messages:
            raise InvalidRequest(f"{self.root} must have at least one item that is a message", param=self.root)
        if len(messages) > MAX_MESSAGES:
            raise InvalidRequest(f"a conversation may have at most {MAX_MESSAGES} messages", param=self.root)
        return messages

    def _item(self, raw: Item, name: str, *, known: bool = False) -> None:
        parsed = decode(raw, OBJECT, name)
        if parsed is None:
            raise InvalidRequest(f"{name} must be an object, got null", param=name)
        fields = Fields(parsed, f"{name}.")
        guess = next((kind for key, kind in _TYPELESS.items() if key in parsed), "nothing")
        kind = fields.take("type", STRING) or guess
        if kind == "item_reference":
            self._item(self._meant(fields), name, known=True)
            return
        fields.take("id", STRING)
        match kind:
            case "message":
                self._spoken(fields, name)
            case "function_call":
                self._called(fields, name)
            case "function_call_output":
                self._returned(fields, name)
            case "reasoning":
                self._thought(fields, name)
            case _ if kind in SKIPPED_ITEMS:
                self.unknown[f"{self.root}[] of type {kind}"] = None
            case _:
                got = describe(fields.raw("type") or b"", shows=True) if "type" in parsed else kind
                where = fields.name("type")
                raise InvalidRequest(f"{where} must be one of {', '.join(ITEM_TYPES)}, got {got}", param=where)
        if self.keeps:
            self.context.append(raw if known else _with_identity(parsed, kind))
        if kind not in SKIPPED_ITEMS:
            self._note(fields, "")

    def _meant(self, fields: Fields) -> Item:
        id = fields.take("id", STRING)
        item = self.find(id) if id is not None else None
        if item is None:
            raise InvalidRequest(
                f"{fields.name('id')} names no item that is stored here; send the item itself",
                param=fields.name("id"),
                code="item_not_found",
            )
        self._num_bytes_meant += len(item)  # 80 bytes of a request may mean megabytes, again and again
        check_text_fits(self._num_bytes_meant, self.model, self.root)
        return item

    def _spoken(self, fields: Fields, name: str) -> None:
        role = fields.take("role", STRING)
        if role is None or role not in ITEM_ROLES:
            got = "nothing" if role is None else describe(fields.raw("role") or b"", shows=True)
            raise InvalidRequest(f"{name}.role must be one of {', '.join(ITEM_ROLES)}, got {got}", param=f"{name}.role")
        if role != "assistant":
            self._turn = None
            self.messages.append({"role": ROLES[role], "content": self._content(fields, name, required=True) or ""})
            return
        spoke = self._turn is not None and bool(self._turn["content"]) and "tool_calls" not in self._turn
        turn = self._assistant(fresh=spoke)
        if text := self._content(fields, name, required=False):
            turn["content"].append(text)

    def _called(self, fields: Fields, name: str) -> None:
        turn = self._assistant(fresh=False)
        calls: list[dict[str, Any]] = turn.setdefault("tool_calls", [])
        if len(calls) == MAX_CALLS:
            raise InvalidRequest(f"{name} is one of more than {MAX_CALLS} calls of one turn", param=name)
        function = function_name(fields)
        arguments = self._arguments(fields.raw("arguments"), fields.name("arguments"))
        calls.append(self._made_call(fields.take("call_id", STRING), function, arguments))
        fields.raw("namespace")  # such tools are left out, so what the function is called says enough

    def _returned(self, fields: Fields, name: str) -> None:
        self._turn = None
        id = self._answered(fields.take("call_id", STRING))
        content = self._content(fields, name, required=False, key="output") or ""
        self.messages.append({"role": "tool", "tool_call_id": id, "content": content})

    def _thought(self, fields: Fields, name: str) -> None:
        """What the model thought, or else the summary of it; what is encrypted was never ours."""
        fields.raw("encrypted_content")
        whole, summary = _texts(fields, "content", "reasoning_text"), _texts(fields, "summary", "summary_text")
        text = whole or summary
        if text:
            acted = self._turn is not None and (bool(self._turn["content"]) or "tool_calls" in self._turn)
            turn = self._assistant(fresh=acted)
            turn.setdefault("reasoning_content", []).append(text)

    def _assistant(self, *, fresh: bool) -> Message:
        """The message of the assistant's turn that is being read; its texts are lists until all are there."""
        if self._turn is None or fresh:
            self._turn = {"role": "assistant", "content": []}
            self.messages.append(self._turn)
            self._unanswered.clear()
        return self._turn


def _texts(fields: Fields, key: str, kind: str) -> str:
    """The joined texts of parts of one type."""
    where = fields.name(key)
    parts = fields.take(key, ARRAY) or []
    if len(parts) > MAX_PARTS:
        raise InvalidRequest(f"{where} must have at most {MAX_PARTS} parts, got {len(parts)}", param=where)
    texts: list[str] = []
    for index, raw in enumerate(parts):
        name = f"{where}[{index}]"
        parsed = decode(bytes(raw), OBJECT, name)
        part = Fields({} if parsed is None else parsed, f"{name}.")
        text = part.take("text", STRING)
        if part.take("type", STRING) != kind or text is None:
            raise InvalidRequest(f"{name} must be a part of type {kind} with a text", param=name)
        texts.append(text)
    return "".join(texts)


def _with_identity(parsed: dict[str, msgspec.Raw], kind: str) -> Item:
    """The item in full form: with a type, an id and a status, a message with its text as a part."""
    full: dict[str, Any] = {"type": kind, **{key: value for key, value in parsed.items() if bytes(value) != b"null"}}
    full.setdefault("id", new_id(kind))
    full.setdefault("status", "completed")
    content = full.get("content")
    if kind == "message" and content is not None and bytes(content).startswith(b'"'):
        spoken = bytes(full["role"]) == b'"assistant"'
        part = {"type": "output_text", "annotations": []} if spoken else {"type": "input_text"}
        full["content"] = [{**part, "text": content}]
    return msgspec.json.encode(full)
