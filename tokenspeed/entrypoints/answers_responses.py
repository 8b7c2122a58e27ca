"""OpenAI's response, whole and as events: output items one after the other, each begun, filled and ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import msgspec

from tokenspeed.engine.lane import Frame, Way
from tokenspeed.entrypoints.answers import EVENT_END, Gathered, TokenTexts, Usage, encode, token_text
from tokenspeed.entrypoints.schema_items import new_id
from tokenspeed.errors import Overloaded, RequestError
from tokenspeed.request import FinishReason, RequestOutput, TokenLogprob
from tokenspeed.text.parsers.choose import AnswerParser
from tokenspeed.text.parsers.events import CallArguments, CallBegun, CallEnded, Content, Event, Reasoning
from tokenspeed.text.parsers.source import ANYTHING
from tokenspeed.text.parsers.thought_tokens import ThoughtTokens
from tokenspeed.text.parsers.tool_parser import Passage

Kind = Literal["message", "reasoning", "function_call"]
Status = Literal["in_progress", "completed", "incomplete", "cancelled", "failed"]

_TEXTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}
"""By the type of an item: what the events that fill it are called."""

_KINDS: dict[type[Event], Kind] = {Content: "message", Reasoning: "reasoning", CallArguments: "function_call"}
CONTENT = Passage(ANYTHING, Content)

OnEnd = Callable[[bytes, list[dict[str, Any]]], None]
"""Is told the whole body and the output items of a response that ended."""


@dataclass(slots=True)
class OutputItem:
    """One item under way. `known` is what is known when it begins.

    An event that fills it is `head`, its number, `middle`, the text and `ending`.
    """

    kind: Kind
    index: int
    known: dict[str, Any]
    id: str = ""
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    head: bytes = b""
    middle: bytes = b""
    ending: bytes = b""
    way: tuple[Passage, Way] | None = None

    def __post_init__(self) -> None:
        self.id = new_id(self.kind)
        delta = f"{_TEXTS[self.kind]}.delta".encode()
        self.head = b'event: %b\ndata: {"type":"%b","sequence_number":' % (delta, delta)
        self.middle = b"," + encode({**self.place(), "delta": ""}).removeprefix(b"{").removesuffix(b'""}')
        self.ending = (b',"logprobs":[]}' if self.kind == "message" else b"}") + EVENT_END

    def place(self) -> dict[str, Any]:
        """What tells an event where it belongs."""
        place: dict[str, Any] = {"item_id": self.id, "output_index": self.index}
        return place if self.kind == "function_call" else {**place, "content_index": 0}

    def part(self, text: str) -> dict[str, Any]:
        """The one content part of a message or a reasoning item."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs}

    def begun(self) -> dict[str, Any]:
        """The item before it has any text."""
        empty: dict[str, Any] = {"arguments": ""} if self.kind == "function_call" else {"content": []}
        return {"id": self.id, "type": self.kind, "status": "in_progress", **self.known, **empty}

    def whole(self, status: Status) -> dict[str, Any]:
        """The item with the text that it has by now."""
        text = "".join(self.texts)
        filled = {"arguments": text} if self.kind == "function_call" else {"content": [self.part(text)]}
        return {"id": self.id, "type": self.kind, "status": status, **self.known, **filled}


class ResponseAnswer:
    """Writes the answer of one response request; `told` is what the response repeats of it.

    `make_parser` makes what finds reasoning and calls; without it all text is a message. Without `shows_reasoning`
    there are no reasoning items. `on_end` is told once, before the client is, how the response ended. `begun` is the
    response before there is any output.
    """

    touches_others: ClassVar[bool] = True  # `on_end`

    def __init__(
        self,
        *,
        id: str,
        model: str,
        told: dict[str, Any],
        texts: TokenTexts,
        make_parser: Callable[[], AnswerParser] | None,
        shows_reasoning: bool,
        streams: bool,
        on_end: OnEnd,
    ) -> None:
        self._response: dict[str, Any] = {
            "id": id,
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": model,
            "output": [],
            "usage": None,
            **told,
        }
        self.begun = encode(self._response)
        self._texts = texts
        self._parser = None if make_parser is None else make_parser()
        self._shows_reasoning = shows_reasoning
        self._streams = streams
        self._on_end: OnEnd | None = on_end
        self._sequence = 0
        self._written: list[bytes] = []
        self._output: list[dict[str, Any]] = []
        self._open: OutputItem | None = None
        self._logprobs: list[dict[str, Any]] = []
        self._thoughts = ThoughtTokens()
        self._finish_reason: FinishReason | None = None

    def opening(self) -> bytes:
        """See `Answer`."""
        self._tell("response.created", response=msgspec.Raw(self.begun))
        self._tell("response.in_progress", response=msgspec.Raw(self.begun))
        return self._take_written()

    def keep_alive(self) -> bytes:
        """An event and not a comment: clients count the silence between events."""
        self._tell("response.in_progress", response={**self._response, "output": self._output})
        return self._take_written()

    def event(self, index: int, output: RequestOutput) -> bytes:
        """See `Answer`."""
        self._read(output.text, len(output.token_ids), output.logprobs or ())
        if output.finish_reason is not None:
            self._finish(output.finish_reason)
        return self._take_written()

    def way(self, index: int) -> tuple[Way, int] | None:
        """See `Answer`."""
        item, passage = self._open, self._passage()
        if item is None or passage is None or item.kind != _KINDS[passage.kind] or self._logprobs:
            return None
        if item.way is None or item.way[0] != passage:
            frame = Frame(item.head, item.ending, numbered=item.middle)
            item.way = passage, Way(frame, passage.plain.but, passage.plain.escapes, passage.quoted)
        return item.way[1], self._sequence

    def passed(self, index: int, text: str, num_tokens: int, num_events: int) -> None:
        """See `Answer`."""
        item, passage = self._open, self._passage()
        assert item is not None and passage is not None
        item.texts.append(text)
        self._sequence += num_events
        if self._parser is not None:
            event = passage.event(text)
            if self._parser.thinks:
                self._thoughts.add([event], num_tokens)
            self._parser.passed(event)

    def _passage(self) -> Passage | None:
        return CONTENT if self._parser is None else self._parser.passage()

    def closing(self, usage: Usage) -> bytes:
        """The whole response. One that the token limit ended is told as completed too, because agents take
        `response.incomplete` for a failure; only a cancelled one is told so."""
        body = self._conclude(usage)
        cancelled = self._response["status"] == "cancelled"
        self._tell("response.incomplete" if cancelled else "response.completed", response=msgspec.Raw(body))
        return self._take_written()

    def failure(self, error: RequestError) -> bytes:
        """See `Answer`."""
        self.failed(error)
        self._tell("response.failed", response=self._response)
        return self._take_written()

    def whole(self, choices: list[Gathered], usage: Usage) -> bytes:
        """See `Answer`."""
        choice, start = choices[0], 0
        for text, count in zip(choice.texts, choice.token_counts, strict=True):
            self._read(text, count, choice.logprobs[start : start + count])
            start += count
        self._finish(choice.finish_reason or "abort")
        return self._conclude(usage)

    def failed(self, error: RequestError) -> None:
        """The response ends with an error, and with the output it has."""
        code = "rate_limit_exceeded" if isinstance(error, Overloaded) else "server_error"
        self._response["error"] = {"code": code, "message": error.message}
        self._end("failed")

    def abandoned(self) -> None:
        """Nobody waits for the rest any more; without effect on a response that has ended."""
        if self._on_end is not None:
            self._end("cancelled")

    # From text to items ------------------------------------------------------------------------------

    def _read(self, text: str, num_tokens: int, logprobs: Sequence[TokenLogprob]) -> None:
        """Take in what was generated."""
        if logprobs:
            self._logprobs += map(self._logprob_json, logprobs)
        if self._parser is None:
            if text:
                self._fill("message", text)
            return
        counts = self._parser.thinks
        events = self._parser.feed(text)
        if counts:
            self._thoughts.add(events, num_tokens)
        for event in events:
            self._add(event)

    def _add(self, event: Event) -> None:
        if isinstance(event, Content):
            self._fill("message", event.text)
            return
        match event:
            case Reasoning(text):
                if self._shows_reasoning:
                    self._fill("reasoning", text)
            case CallBegun(_, id, name):
                self._begin("function_call", {"call_id": id, "name": name})
            case CallArguments(_, fragment):
                self._fill("function_call", fragment)
            case CallEnded():
                self._close("completed")
        self._logprobs.clear()  # of tokens that are no text of a message

    def _fill(self, kind: Kind, text: str) -> None:
        """More text of the open item, or of a new one if that is of another type."""
        item = self._open
        if item is None or item.kind != kind:
            item = self._begin(kind, {"role": "assistant"} if kind == "message" else {"summary": []})
        item.texts.append(text)
        ending = item.ending
        if kind == "message" and self._logprobs:
            logprobs = self._logprobs_of(text)
            item.logprobs += logprobs
            ending = b',"logprobs":%b}%b' % (encode(logprobs), EVENT_END)
        if self._streams:
            self._written.append(b"%b%d%b%b%b" % (item.head, self._sequence, item.middle, encode(text), ending))
            self._sequence += 1

    def _begin(self, kind: Kind, known: dict[str, Any]) -> OutputItem:
        self._close("completed")
        item = self._open = OutputItem(kind, len(self._output), known)
        self._tell("response.output_item.added", output_index=item.index, item=item.begun())
        if kind != "function_call":
            self._tell("response.content_part.added", **item.place(), part=item.part(""))
        return item

    def _close(self, status: Status) -> None:
        """End the open item, if there is one."""
        item, self._open = self._open, None
        if item is None:
            return
        whole = item.whole(status)
        text = "".join(item.texts)
        match item.kind:
            case "function_call":
                self._tell(f"{_TEXTS[item.kind]}.done", **item.place(), name=item.known["name"], arguments=text)
            case "reasoning":
                self._tell(f"{_TEXTS[item.kind]}.done", **item.place(), text=text)
            case "message":
                self._tell(f"{_TEXTS[item.kind]}.done", **item.place(), text=text, logprobs=item.logprobs)
        if item.kind != "function_call":
            self._tell("response.content_part.done", **item.place(), part=item.part(text))
        self._tell("response.output_item.done", output_index=item.index, item=whole)
        self._output.append(whole)

    def _finish(self, reason: FinishReason) -> None:
        """There is no more text."""
        for event in self._parser.finish() if self._parser is not None else ():
            # What was cut off has ended too, but not by itself.
            if not isinstance(event, CallEnded) or reason == "stop":
                self._add(event)
        self._close("completed" if reason == "stop" else "incomplete")
        self._finish_reason = reason

    # The response ------------------------------------------------------------------------------------

    def _conclude(self, usage: Usage) -> bytes:
        """The body of a response that ended by itself, by the token limit, or by being cancelled."""
        self._response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._thoughts.count},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        match self._finish_reason:
            case "length":
                self._response["incomplete_details"] = {"reason": "max_output_tokens"}
                return self._end("incomplete")
            case "abort":
                return self._end("cancelled")
        self._response["completed_at"] = int(time.time())
        return self._end("completed")

    def _end(self, status: Status) -> bytes:
        self._close("incomplete")
        self._response |= {"status": status, "output": self._output}
        body = encode(self._response)
        if self._on_end is not None:
            self._on_end(body, self._output)
            self._on_end = None
        return body

    def _tell(self, kind: str, **payload: Any) -> None:
        if self._streams:
            event = encode({"type": kind, "sequence_number": self._sequence, **payload})
            self._written.append(b"event: %b\ndata: %b%b" % (kind.encode(), event, EVENT_END))
            self._sequence += 1

    def _take_written(self) -> bytes:
        written = b"".join(self._written)
        self._written.clear()
        return written

    def _logprobs_of(self, text: str) -> list[dict[str, Any]]:
        """Take those of the tokens that the text is made of. What came before them was markup, the rest waits."""
        waiting, wanted = self._logprobs, text.encode()
        joined = b"".join(bytes(entry["bytes"]) for entry in waiting)
        start = joined.rfind(wanted)
        start, end = (start, start + len(wanted)) if start >= 0 else (0, len(joined))
        taken: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        after = 0
        for entry in waiting:
            before, after = after, after + len(entry["bytes"])
            if before >= end:
                rest.append(entry)
            elif after > start:
                taken.append(entry)
        self._logprobs = rest
        return taken

    def _logprob_json(self, entry: TokenLogprob) -> dict[str, Any]:
        top = zip(entry.top_ids, entry.top_logprobs, strict=True)
        return {
            **self._token_json(entry.token_id, entry.logprob),
            "top_logprobs": [self._token_json(token_id, logprob) for token_id, logprob in top],
        }

    def _token_json(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._texts.token_bytes(token_id)
        return {"token": token_text(self._texts, token_id), "logprob": logprob, "bytes": list(raw)}
