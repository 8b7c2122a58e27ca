"""Anthropic's message, whole and as events: content blocks one after the other, each begun, filled and ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import msgspec

from tokenspeed.engine.lane import Frame, Way
from tokenspeed.entrypoints.answers import EVENT_END, KEEP_ALIVE, Gathered, Usage, encode
from tokenspeed.entrypoints.errors import GenerationFailed, anthropic_error_body
from tokenspeed.entrypoints.thought_signature import signature_of
from tokenspeed.errors import RequestError
from tokenspeed.request import FinishReason, RequestOutput
from tokenspeed.text.parsers.choose import AnswerParser
from tokenspeed.text.parsers.events import CallArguments, CallBegun, CallEnded, Content, Event, Reasoning
from tokenspeed.text.parsers.repair import arguments_object
from tokenspeed.text.parsers.source import ANYTHING
from tokenspeed.text.parsers.thought_tokens import ThoughtTokens
from tokenspeed.text.parsers.tool_parser import Passage

PING = b'event: ping\ndata: {"type":"ping"}' + EVENT_END

_DELTAS = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
"""By the type of a block: the type of what is added to it, and the field that holds it."""

_BLOCKS = {Content: "text", Reasoning: "thinking", CallArguments: "tool_use"}
CONTENT = Passage(ANYTHING, Content)


class MessagesAnswer:
    """Writes the answer of one messages request.

    `max_tokens` is what was asked for; an answer that the limit ended before that has filled the context. Without
    `shows_thinking` a thinking block is told with its signature and without its text.
    """

    touches_others: ClassVar[bool] = False

    def __init__(
        self,
        *,
        id: str,
        model: str,
        prompt_tokens: int,
        max_tokens: int,
        make_parser: Callable[[], AnswerParser] | None,
        shows_thinking: bool,
    ) -> None:
        self._id = id
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._max_tokens = max_tokens
        self._parser = None if make_parser is None else make_parser()
        self._thought = ThoughtTokens() if self._parser is not None and self._parser.thinks else None
        self._shows_thinking = shows_thinking
        self._started = False
        self._calls = False
        self._num_blocks = 0
        self._open: str | None = None
        self._frame: list[bytes] = []
        self._way: tuple[Passage, Way] | None = None
        self._thoughts: list[str] = []
        self._stop: dict[str, Any] = {}

    def opening(self) -> bytes:
        """Nothing: how much of the prompt was cached, which the first event tells, is known with the first output."""
        return b""

    def keep_alive(self) -> bytes:
        """A ping, which may not come before the message has started; until then a comment."""
        return PING if self._started else KEEP_ALIVE

    def event(self, index: int, output: RequestOutput) -> bytes:
        """See `Answer`. Raises `GenerationFailed` when the request was aborted: Anthropic has no name for that."""
        ended = output.finish_reason is not None
        events = self._events(output.text, len(output.token_ids), ended)
        if self._started and not ended and len(events) == 1 and self._open == "text" and isinstance(events[0], Content):
            return encode(events[0].text).join(self._frame)
        written = [] if self._started else [self._start(output), PING]
        written += map(self._written, events)
        if ended:
            written.append(self._end())
            self._stop = self._stopped(output.finish_reason, output.stop_reason, output.num_output_tokens)
        return b"".join(written)

    def way(self, index: int) -> tuple[Way, int] | None:
        """See `Answer`."""
        passage = self._passage()
        if passage is None or _BLOCKS[passage.kind] != self._open:
            return None
        if passage.kind is Reasoning and not self._shows_thinking:
            return None
        if self._way is None or self._way[0] != passage:
            self._way = passage, Way(Frame(*self._frame), passage.plain.but, passage.plain.escapes, passage.quoted)
        return self._way[1], 0

    def passed(self, index: int, text: str, num_tokens: int, num_events: int) -> None:
        """See `Answer`."""
        passage = self._passage()
        assert passage is not None
        event = passage.event(text)
        if isinstance(event, Reasoning):
            self._thoughts.append(text)
        if self._parser is not None:
            if self._parser.thinks and self._thought is not None:
                self._thought.add([event], num_tokens)
            self._parser.passed(event)

    def _passage(self) -> Passage | None:
        return CONTENT if self._parser is None else self._parser.passage()

    def closing(self, usage: Usage) -> bytes:
        """Why the message stopped, the final usage, and its end."""
        told = _event("message_delta", delta=self._stop, usage=self._usage(usage))
        return told + _event("message_stop")

    def failure(self, error: RequestError) -> bytes:
        """One error event, which nothing follows."""
        return b"event: error\ndata: " + anthropic_error_body(error) + EVENT_END

    def whole(self, choices: list[Gathered], usage: Usage) -> bytes:
        """See `Answer`; raises as `event` does."""
        choice = choices[0]
        content = self._blocks(self._all_events(choice))
        stop = self._stopped(choice.finish_reason, choice.stop_reason, len(choice.token_ids))
        return encode(self._message(content, stop, usage))

    def _message(self, content: list[dict[str, Any]], stop: dict[str, Any], usage: Usage) -> dict[str, Any]:
        about = {"id": self._id, "type": "message", "role": "assistant", "model": self._model}
        return {**about, "content": content, **stop, "usage": self._usage(usage)}

    def _usage(self, usage: Usage) -> dict[str, Any]:
        """Anthropic counts the cached tokens of a prompt apart. Writing to the cache costs nothing here."""
        told: dict[str, Any] = {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }
        if self._thought is not None:
            told["output_tokens_details"] = {"thinking_tokens": self._thought.count}
        return told

    def _start(self, output: RequestOutput) -> bytes:
        self._started = True
        usage = Usage(self._prompt_tokens, output.num_cached_tokens, output.num_output_tokens)
        message = self._message([], {"stop_reason": None, "stop_sequence": None}, usage)
        return _event("message_start", message=message)

    def _events(self, text: str, num_tokens: int, ended: bool) -> list[Event]:
        parser = self._parser
        if parser is None:
            return [Content(text)] if text else []
        thinks = parser.thinks
        events = parser.feed(text) if text else []
        if thinks and self._thought is not None:
            self._thought.add(events, num_tokens)
        return events + parser.finish() if ended else events

    def _all_events(self, choice: Gathered) -> list[Event]:
        """Those of a whole answer. Its thinking is read as it came, so that the tokens of it are counted."""
        events: list[Event] = []
        read = 0
        while self._parser is not None and self._parser.thinks and read < len(choice.texts):
            events += self._events(choice.texts[read], choice.token_counts[read], ended=False)
            read += 1
        return events + self._events("".join(choice.texts[read:]), 0, ended=True)

    def _written(self, event: Event) -> bytes:
        match event:
            case Content(text):
                return self._begun("text", {"text": ""}) + encode(text).join(self._frame)
            case Reasoning(text):
                begun = self._begun("thinking", {"thinking": "", "signature": ""})
                self._thoughts.append(text)
                return begun + encode(text).join(self._frame) if self._shows_thinking else begun
            case CallBegun(_, id, name):
                self._calls = True
                return self._end() + self._begun("tool_use", {"id": id, "name": name, "input": {}})
            case CallArguments(_, fragment):
                return encode(fragment).join(self._frame)
            case CallEnded():
                return self._end()

    def _begun(self, kind: str, block: dict[str, Any]) -> bytes:
        """What begins a block of this kind; nothing where one is open."""
        if self._open == kind:
            return b""
        ended = self._end()
        index = self._num_blocks
        self._num_blocks += 1
        self._open = kind
        marker = "\x00text\x00"
        name, field = _DELTAS[kind]
        delta = {"type": name, field: marker}
        self._way = None
        self._frame = _event("content_block_delta", index=index, delta=delta).split(encode(marker))
        return ended + _event("content_block_start", index=index, content_block={"type": kind, **block})

    def _end(self) -> bytes:
        """What ends the open block; nothing where there is none."""
        if self._open is None:
            return b""
        index = self._num_blocks - 1
        signed = b""
        if self._open == "thinking":
            delta = {"type": "signature_delta", "signature": signature_of("".join(self._thoughts))}
            signed = _event("content_block_delta", index=index, delta=delta)
            self._thoughts.clear()
        self._open = None
        return signed + _event("content_block_stop", index=index)

    def _blocks(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        """The content of a whole message, in which what events tell in pieces is one."""
        blocks: list[tuple[dict[str, Any], list[str]]] = []
        for event in events:
            match event:
                case Content(text) | Reasoning(text):
                    kind = "text" if isinstance(event, Content) else "thinking"
                    if not blocks or blocks[-1][0]["type"] != kind:
                        blocks.append(({"type": kind}, []))
                    blocks[-1][1].append(text)
                case CallBegun(_, id, name):
                    self._calls = True
                    blocks.append(({"type": "tool_use", "id": id, "name": name}, []))
                case CallArguments(_, fragment):
                    blocks[-1][1].append(fragment)
        return [self._block(about, "".join(pieces)) for about, pieces in blocks]

    def _block(self, about: dict[str, Any], text: str) -> dict[str, Any]:
        if about["type"] == "text":
            return {**about, "text": text}
        if about["type"] == "tool_use":
            return {**about, "input": _input(text)}
        return {**about, "thinking": text if self._shows_thinking else "", "signature": signature_of(text)}

    def _stopped(self, reason: FinishReason | None, by: int | str | None, num_tokens: int) -> dict[str, Any]:
        """`stop_reason` and `stop_sequence`."""
        if reason == "abort":
            raise GenerationFailed("the request was aborted before its answer was complete")
        if reason == "length":
            named = "max_tokens" if num_tokens >= self._max_tokens else "model_context_window_exceeded"
        elif isinstance(by, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": by}
        else:
            named = "tool_use" if self._calls else "end_turn"
        return {"stop_reason": named, "stop_sequence": None}


def _event(name: str, **fields: Any) -> bytes:
    """An event line, and a data line with the same type."""
    return b"event: " + name.encode() + b"\ndata: " + encode({"type": name, **fields}) + EVENT_END


def _input(arguments: str) -> msgspec.Raw:
    """The arguments of a call as an object, in the words of the model; made into one where it wrote none."""
    try:
        msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
        return msgspec.Raw(arguments.encode())
    except msgspec.DecodeError:
        return msgspec.Raw(encode(arguments_object(arguments)[0]))
