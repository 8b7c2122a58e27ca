"""chat.completion and chat.completion.chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from tokenspeed.engine.lane import Frame, Way
from tokenspeed.entrypoints.answers import (
    Gathered,
    OpenAIEvents,
    TokenTexts,
    Usage,
    encode,
    event,
    prompt_logprobs_json,
    token_text,
)
from tokenspeed.entrypoints.schema import Delivery
from tokenspeed.request import FinishReason, RequestOutput, SamplingParams, TokenLogprob
from tokenspeed.text.parsers.choose import AnswerParser
from tokenspeed.text.parsers.events import CallArguments, CallBegun, Content, Event, Reasoning
from tokenspeed.text.parsers.source import ANYTHING
from tokenspeed.text.parsers.thought_tokens import ThoughtTokens
from tokenspeed.text.parsers.tool_parser import Passage

MARKER, IDS = "\x00text\x00", "\x00ids\x00"
"""Stand for the text and the token ids in the frame of an event."""
CONTENT = Passage(ANYTHING, Content)


@dataclass(slots=True)
class Turn:
    """What events add to an assistant message: a delta of it, or the whole."""

    content: str = ""
    reasoning: str = ""
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, events: Sequence[Event]) -> None:
        """Take in events in their order."""
        for item in events:
            match item:
                case Content(text):
                    self.content += text
                case Reasoning(text):
                    self.reasoning += text
                case CallBegun(index, id, name):
                    self.calls[index] = {"id": id, "type": "function", "function": {"name": name, "arguments": ""}}
                case CallArguments(index, fragment):
                    call = self.calls.setdefault(index, {"function": {"arguments": ""}})
                    call["function"]["arguments"] += fragment


class ChatAnswer(OpenAIEvents):
    """Writes the answer of one chat request. The usual event is a byte template around the encoded text.

    `make_parser` makes what finds reasoning and tool calls in a choice; without it all text is content. Reasoning
    goes out under each of the `reasoning_fields`, and is left out if there are none.
    """

    def __init__(
        self,
        *,
        id: str,
        created: int,
        delivery: Delivery,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        texts: TokenTexts,
        make_parser: Callable[[], AnswerParser] | None,
        reasoning_fields: Sequence[str],
    ) -> None:
        self._base = {"id": id, "created": created, "model": delivery.model}
        self._usage_null = delivery.stream and delivery.include_usage
        super().__init__({**self._base, "object": "chat.completion.chunk"} if self._usage_null else None)
        self._token_ids = delivery.return_token_ids
        self._logprobs = params.logprobs is not None
        self._prompt_logprobs = params.prompt_logprobs is not None
        self._prompt_token_ids = prompt_token_ids
        self._texts = texts
        self._parsers = [make_parser() for _ in range(params.n)] if make_parser is not None else None
        thinks = self._parsers is not None and self._parsers[0].thinks
        self._thoughts = [ThoughtTokens() for _ in range(params.n)] if thinks else None
        self._reasoning_fields = reasoning_fields
        self._started: set[int] = set()
        self._calling: set[int] = set()
        self._plain = not self._token_ids and not self._logprobs
        self._content = [self._frame(index, {"content": MARKER}) for index in range(params.n)]
        self._reasoning: list[list[bytes]] | None = None
        if len(reasoning_fields) == 1:
            self._reasoning = [self._frame(index, {reasoning_fields[0]: MARKER}) for index in range(params.n)]
        self._arguments: dict[tuple[int, int], list[bytes]] = {}
        self._ways: dict[tuple[int, Passage], Way] = {}

    def event(self, index: int, output: RequestOutput) -> bytes:
        """See `Answer`."""
        ended = output.finish_reason is not None
        events = self._read(index, output.text, ended, len(output.token_ids))
        first = index not in self._started
        if self._plain and not ended:
            if not events:
                return b""
            if len(events) == 1 and not first and (framed := self._framed(index, events[0])) is not None:
                return framed
        turn = Turn()
        turn.add(events)
        if self._plain and not ended and not (turn.calls or turn.content or turn.reasoning):
            return b""
        if turn.calls:
            self._calling.add(index)
        choice: dict[str, Any] = {
            "index": index,
            "delta": self._delta(turn, first),
            "logprobs": self._logprobs_json(output.logprobs or ()),
            "finish_reason": _finish_reason(output.finish_reason, index in self._calling),
        }
        if first:
            self._started.add(index)
        if ended:
            choice["stop_reason"] = output.stop_reason
        if self._token_ids:
            choice["token_ids"] = output.token_ids
        chunk = self._chunk(choice)
        if self._token_ids and first:
            chunk["prompt_token_ids"] = list(self._prompt_token_ids)
        return event(chunk)

    def way(self, index: int) -> tuple[Way, int] | None:
        """See `Answer`."""
        passage = CONTENT if self._parsers is None else self._parsers[index].passage()
        if passage is None or self._logprobs or index not in self._started:
            return None
        way = self._ways.get((index, passage))
        if way is None:
            if passage.kind is Reasoning and len(self._reasoning_fields) != 1:
                return None
            way = self._ways[index, passage] = self._new_way(index, passage)
        return way, 0

    def passed(self, index: int, text: str, num_tokens: int, num_events: int) -> None:
        """See `Answer`."""
        if self._parsers is None:
            return
        parser = self._parsers[index]
        passage = parser.passage()
        assert passage is not None
        event = passage.event(text)
        if parser.thinks and self._thoughts is not None:
            self._thoughts[index].add([event], num_tokens)
        parser.passed(event)

    def closing(self, usage: Usage) -> bytes:
        """See `Answer`."""
        return super().closing(self._with_thoughts(usage))

    def whole(self, choices: list[Gathered], usage: Usage) -> bytes:
        """See `Answer`."""
        body: dict[str, Any] = {
            **self._base,
            "object": "chat.completion",
            "choices": [self._choice(choice) for choice in choices],
            "usage": self._with_thoughts(usage).as_json(),
        }
        if self._prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs_json(choices[0].prompt_logprobs, self._texts)
        if self._token_ids:
            body["prompt_token_ids"] = list(self._prompt_token_ids)
        return encode(body)

    def _frame(self, index: int, delta: dict[str, Any]) -> list[bytes]:
        """What stands before and behind the text `MARKER` in an event that adds only text."""
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return event(self._chunk(choice)).split(encode(MARKER))

    def _new_way(self, index: int, passage: Passage) -> Way:
        if passage.kind is CallArguments:
            delta: dict[str, Any] = _arguments_delta(passage.call)
        else:
            delta = {self._reasoning_fields[0] if passage.kind is Reasoning else "content": MARKER}
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        if not self._token_ids:
            head, tail = event(self._chunk(choice)).split(encode(MARKER))
            frame = Frame(head, tail)
        else:
            head, rest = event(self._chunk({**choice, "token_ids": IDS})).split(encode(MARKER))
            between, tail = rest.split(encode(IDS))
            frame = Frame(head, tail, ids=between)
        return Way(frame, passage.plain.but, passage.plain.escapes, passage.quoted)

    def _framed(self, index: int, item: Event) -> bytes | None:
        """The event of a choice for which the text is all that is new, None where there is more to say."""
        kind = type(item)
        if kind is Content:
            return encode(item.text).join(self._content[index])  # type: ignore[union-attr]
        if kind is Reasoning and self._reasoning is not None:
            return encode(item.text).join(self._reasoning[index])  # type: ignore[union-attr]
        if isinstance(item, CallArguments):
            frame = self._arguments.get((index, item.index))
            if frame is None:
                frame = self._arguments[index, item.index] = self._frame(index, _arguments_delta(item.index))
            return encode(item.fragment).join(frame)
        return None

    def _read(self, index: int, text: str, ended: bool, num_tokens: int) -> list[Event]:
        """What more text of a choice turns out to be."""
        if self._parsers is None:
            return [Content(text)] if text else []
        parser = self._parsers[index]
        events = self._counted(index, text, num_tokens) if parser.thinks else parser.feed(text)
        if ended:
            events = [*events, *parser.finish()]
        if not self._reasoning_fields:
            events = [item for item in events if not isinstance(item, Reasoning)]
        return events

    def _whole_turn(self, choice: Gathered) -> Turn:
        """A choice's message. While it thinks it is read as it came, so that the tokens of its thinking are counted."""
        if self._parsers is None:
            return Turn(content="".join(choice.texts))
        parser, events, read = self._parsers[choice.index], list[Event](), 0
        while parser.thinks and read < len(choice.texts):
            events += self._counted(choice.index, choice.texts[read], choice.token_counts[read])
            read += 1
        turn = Turn()
        turn.add(_joined(events))
        turn.add([*parser.feed("".join(choice.texts[read:])), *parser.finish()])
        if not self._reasoning_fields:
            turn.reasoning = ""
        return turn

    def _counted(self, index: int, text: str, num_tokens: int) -> list[Event]:
        assert self._parsers is not None and self._thoughts is not None
        events = self._parsers[index].feed(text)
        self._thoughts[index].add(events, num_tokens)
        return events

    def _with_thoughts(self, usage: Usage) -> Usage:
        if self._thoughts is not None:
            usage.reasoning_tokens = sum(thoughts.count for thoughts in self._thoughts)
        return usage

    def _delta(self, turn: Turn, first: bool) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if turn.reasoning:
            delta.update(dict.fromkeys(self._reasoning_fields, turn.reasoning))
        if turn.content or (first and not turn.reasoning and not turn.calls):
            delta["content"] = turn.content
        if turn.calls:
            delta["tool_calls"] = [{"index": index, **call} for index, call in turn.calls.items()]
        return delta

    def _choice(self, choice: Gathered) -> dict[str, Any]:
        turn = self._whole_turn(choice)
        message: dict[str, Any] = {"role": "assistant", "content": turn.content or (None if turn.calls else "")}
        if turn.reasoning:
            message.update(dict.fromkeys(self._reasoning_fields, turn.reasoning))
        if turn.calls:
            message["tool_calls"] = list(turn.calls.values())
        result: dict[str, Any] = {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs_json(choice.logprobs),
            "finish_reason": _finish_reason(choice.finish_reason, bool(turn.calls)),
            "stop_reason": choice.stop_reason,
        }
        if self._token_ids:
            result["token_ids"] = choice.token_ids
        return result

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._base, "object": "chat.completion.chunk", "choices": [choice]}
        if self._usage_null:
            chunk["usage"] = None
        return chunk

    def _logprobs_json(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = []
        for entry in entries:
            item = self._token_json(entry.token_id, entry.logprob)
            top = zip(entry.top_ids, entry.top_logprobs, strict=True)
            item["top_logprobs"] = [self._token_json(token_id, logprob) for token_id, logprob in top]
            content.append(item)
        return {"content": content}

    def _token_json(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._texts.token_bytes(token_id)
        return {"token": token_text(self._texts, token_id), "logprob": logprob, "bytes": list(raw)}


def _arguments_delta(call: int) -> dict[str, Any]:
    return {"tool_calls": [{"index": call, "function": {"arguments": MARKER}}]}


def _joined(events: list[Event]) -> list[Event]:
    """The same with neighbours of one kind in one: adding each to a long text would copy it each time."""
    result: list[Event] = []
    for kind, run in groupby(events, type):
        if issubclass(kind, Content | Reasoning):
            result.append(kind("".join(event.text for event in run if isinstance(event, Content | Reasoning))))
        else:
            result += run
    return result


def _finish_reason(reason: FinishReason | None, calls: bool) -> str | None:
    """A choice that ended by itself and calls tools has ended for that."""
    return "tool_calls" if calls and reason == "stop" else reason
