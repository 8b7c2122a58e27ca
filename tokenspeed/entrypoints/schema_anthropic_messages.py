"""The messages of Anthropic's API as a template gets them: blocks become text, thoughts, calls and results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import msgspec

from tokenspeed.entrypoints.body import ARRAY, BOOLEAN, OBJECT, STRING, Fields, decode, describe
from tokenspeed.entrypoints.limits import MAX_CALLS, MAX_MESSAGES, MAX_PARTS
from tokenspeed.entrypoints.schema_messages import Message, MessageReader
from tokenspeed.entrypoints.schema_tools import function_name
from tokenspeed.entrypoints.thought_signature import thinking_of
from tokenspeed.errors import InvalidRequest

ROLES = ("user", "assistant", "system")

BILLING = "x-anthropic-billing-header:"
"""How the block begins that Claude Code puts before its system prompt, with a text that differs in every request."""

BLOCK_HINTS = ("caller", "citations", "toolset_name")
"""Fields of blocks that clients send back and that have no effect; `MESSAGE_HINTS` has those of other routes too."""

PARAGRAPH = "\n\n"
"""Between the messages of one role that become one; the blocks of a message are joined as they are."""


@dataclass(slots=True)
class BlockReader(MessageReader):
    """As `MessageReader`, for Anthropic's shape. Neighbours of one role become one message."""

    def read(self, raw: bytes, *, system: str = "") -> list[Message]:
        """The checked messages behind a system prompt, or `InvalidRequest` naming the first field at fault."""
        items = decode(raw, ARRAY, self.root) or []
        if not 1 <= len(items) <= MAX_MESSAGES:
            raise InvalidRequest(
                f"{self.root} must have 1 to {MAX_MESSAGES} entries, got {len(items)}", param=self.root
            )
        made: list[Message] = [{"role": "system", "content": system}] if system else []
        for index, item in enumerate(items):
            made += self._turn(bytes(item), f"{self.root}[{index}]")
        messages: list[Message] = []
        for role, group in groupby(made, itemgetter("role")):
            neighbours = list(group)
            messages += neighbours if role == "tool" else [_joined(neighbours)]
        if messages and messages[-1] == {"role": "assistant", "content": ""}:
            messages.pop()  # an agent's own failed attempt: there is nothing to go on with
        if len(messages) <= bool(system):
            raise InvalidRequest(f"{self.root} must have a message that says something", param=self.root)
        if messages[-1].get("tool_calls"):
            raise InvalidRequest(f"{self.root} must not end with a tool_use that has no tool_result", param=self.root)
        return messages

    def system(self, fields: Fields) -> str:
        """The text of a system prompt, without what a client adds for its own accounts."""
        texts = self._texts(fields, self.root)
        return "".join(text for text in texts if not text.startswith(BILLING))

    def _turn(self, raw: bytes, name: str) -> list[Message]:
        inner = decode(raw, OBJECT, name)
        if inner is None:
            raise InvalidRequest(f"{name} must be an object, got null", param=name)
        fields = Fields(inner, name + ".")
        role = fields.take("role", STRING)
        if role not in ROLES:
            got = "nothing" if role is None else describe(fields.raw("role") or b"", shows=True)
            raise InvalidRequest(f"{name}.role must be one of {', '.join(ROLES)}, got {got}", param=f"{name}.role")
        if role == "user":
            made = self._user(fields)
        elif role == "assistant":
            made = [self._assistant(fields)]
        else:
            text = "".join(self._texts(fields, "content"))
            made = [{"role": "system", "content": text}] if text else []
        self._note(fields, "")
        return made

    def _user(self, fields: Fields) -> list[Message]:
        """Results become messages of tools, in their order; text around them messages of the user."""
        if (fields.raw("content") or b"[]") == b"[]":
            where = fields.name("content")
            raise InvalidRequest(f"{where} is required: a string or an array of content blocks", param=where)
        made: list[Message] = []
        said: list[str] = []
        for kind, block in self._blocks(fields, "content"):
            if kind == "tool_result":
                made.append(self._tool_result(block))
            elif kind == "text":
                text = self._text(block)
                if made and made[-1]["role"] == "user":
                    said.append(text)
                elif text or not made:
                    said = [text]
                    made.append({"role": "user", "content": said})
            else:
                raise _refused(block, kind, "text or tool_result")
        for message in made:
            message["content"] = "".join(message["content"])
        return made

    def _assistant(self, fields: Fields) -> Message:
        texts: list[str] = []
        thoughts: list[str] = []
        calls = []
        self._unanswered.clear()
        for kind, block in self._blocks(fields, "content"):
            if kind == "text":
                texts.append(self._text(block))
            elif kind == "thinking":
                signature = block.take_or("signature", STRING, "")
                thoughts.append(block.take_or("thinking", STRING, "") or thinking_of(signature))
            elif kind == "tool_use":
                calls.append(self._tool_use(block))
            elif kind == "server_tool_use" or (kind or "").endswith("_tool_result"):
                self.unknown[f"messages[].content[] of type {(kind or '')[:64]}"] = None
            elif kind != "redacted_thinking":
                raise _refused(block, kind, "text, thinking or tool_use")
        if len(calls) > MAX_CALLS:
            where = fields.name("content")
            raise InvalidRequest(f"{where} must have at most {MAX_CALLS} calls, got {len(calls)}", param=where)
        message: Message = {"role": "assistant", "content": "".join(texts)}
        if thought := "".join(thoughts):
            message["reasoning_content"] = thought
        if calls:
            # Null, as OpenAI has it: templates tell a message that only calls from one that also speaks.
            message |= {"content": message["content"] or None, "tool_calls": calls}
        return message

    def _tool_use(self, block: Fields) -> Message:
        name = function_name(block)
        arguments = self._arguments(block.raw("input"), block.name("input"))
        made = self._made_call(block.take("id", STRING), name, arguments)
        self._note_block(block)
        return made

    def _tool_result(self, block: Fields) -> Message:
        id = self._answered(block.take("tool_use_id", STRING))
        text = "".join(self._texts(block, "content", references=True))
        if block.take_or("is_error", BOOLEAN, False):
            text = f"Error: {text}"
        self._note_block(block)
        return {"role": "tool", "tool_call_id": id, "content": text}

    def _texts(self, fields: Fields, key: str, *, references: bool = False) -> list[str]:
        """The text of each block where nothing else is allowed but, with `references`, the name of a tool."""
        texts: list[str] = []
        for kind, block in self._blocks(fields, key):
            if kind == "tool_reference" and references:
                # A search of the client's found this tool. All tools are in the prompt from the start.
                texts.append(f"The tool {block.take_or('tool_name', STRING, '')} is available.")
            elif kind == "text":
                texts.append(self._text(block))
            else:
                raise _refused(block, kind, "text")
        return texts

    def _text(self, block: Fields) -> str:
        text = block.take("text", STRING)
        if text is None:
            raise InvalidRequest(f"{block.name('text')} is required", param=block.name("text"))
        self._note_block(block)
        return text

    def _blocks(self, fields: Fields, key: str) -> Iterator[tuple[str | None, Fields]]:
        """The type and the fields of each block; a string is one of text, null is none."""
        raw, where = fields.raw(key), fields.name(key)
        if raw is None:
            return
        if raw.startswith(b'"'):
            yield "text", Fields({"text": msgspec.Raw(raw)}, f"{where}.")
            return
        if not raw.startswith(b"["):
            raise InvalidRequest(
                f"{where} must be a string or an array of content blocks, got {describe(raw, shows=False)}", param=where
            )
        items = decode(raw, ARRAY, where) or []
        if len(items) > MAX_PARTS:
            raise InvalidRequest(f"{where} must have at most {MAX_PARTS} blocks, got {len(items)}", param=where)
        for index, item in enumerate(items):
            name = f"{where}[{index}]"
            inner = decode(bytes(item), OBJECT, name)
            if inner is None:
                raise InvalidRequest(f"{name} must be an object, got null", param=name)
            block = Fields(inner, f"{name}.")
            yield block.take("type", STRING), block

    def _note_block(self, block: Fields) -> None:
        for key in BLOCK_HINTS:
            block.raw(key)
        self._note(block, "content[].")


def _joined(neighbours: list[Message]) -> Message:
    """Messages of one role as one: an assistant's goes on, others begin a paragraph."""
    if len(neighbours) == 1:
        return neighbours[0]
    role = neighbours[0]["role"]
    texts = [message["content"] for message in neighbours if message["content"]]
    joined: Message = {"role": role, "content": ("" if role == "assistant" else PARAGRAPH).join(texts)}
    if thought := "".join(message.get("reasoning_content", "") for message in neighbours):
        joined["reasoning_content"] = thought
    if calls := [call for message in neighbours for call in message.get("tool_calls", ())]:
        joined |= {"content": joined["content"] or None, "tool_calls": calls}
    return joined


def _refused(block: Fields, kind: str | None, allowed: str) -> InvalidRequest:
    where = block.name("type")
    got = "nothing" if kind is None else describe(block.raw("type") or b"", shows=True)
    return InvalidRequest(f"{where} must be {allowed}: this model takes text only, got {got}", param=where)
