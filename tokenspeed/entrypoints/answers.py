"""What every answer is made of: gathered choices, usage, and log-probabilities with the tokens' texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import msgspec

from tokenspeed.engine.lane import Way
from tokenspeed.entrypoints.errors import error_body
from tokenspeed.errors import RequestError
from tokenspeed.request import FinishReason, RequestOutput, TokenLogprob

EVENT_END = b"\n\n"
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

encode = msgspec.json.Encoder().encode


class TokenTexts(Protocol):
    """The part of a tokenizer that log-probabilities need."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""
        ...


@dataclass(slots=True)
class Usage:
    """Token counts of one answer; prompts are counted once, whatever n is.

    `reasoning_tokens` are those of the completion that were thinking, None where nobody looks for any.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int | None = None

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object; cached_tokens is always there, 0 included."""
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return usage


@dataclass(slots=True)
class Gathered:
    """One choice of an answer that is not streamed. `index` numbers choices over all prompts.

    `token_counts` says how many of the tokens each of the texts has.
    """

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    token_counts: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, output: RequestOutput) -> None:
        """Take in one delta."""
        self.texts.append(output.text)
        self.token_ids.extend(output.token_ids)
        self.token_counts.append(len(output.token_ids))
        self.logprobs.extend(output.logprobs or ())
        self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.stop_reason = output.stop_reason


class Answer(Protocol):
    """A way to write outputs down, as events or whole: one for each kind of answer.

    Where `whole` `touches_others`, it belongs to the event loop; elsewhere a large one is written in a worker thread.
    """

    touches_others: ClassVar[bool]

    def opening(self) -> bytes:
        """The events that come before any output, sent with the headers."""
        ...

    def event(self, index: int, output: RequestOutput) -> bytes:
        """The server-sent events for a delta of choice `index`; empty when the delta tells nothing yet."""
        ...

    def way(self, index: int) -> tuple[Way, int] | None:
        """How more text alone of choice `index` would be told, and the number of that event; None if not by one event.

        Asked after an event of that choice. Text that then goes that way is told by `passed` before the next event.
        """
        ...

    def passed(self, index: int, text: str, num_tokens: int, num_events: int) -> None:
        """This is what went that way."""
        ...

    def keep_alive(self) -> bytes:
        """What is sent after a long silence."""
        ...

    def closing(self, usage: Usage) -> bytes:
        """The events after the last output."""
        ...

    def failure(self, error: RequestError) -> bytes:
        """The one event that ends a stream which cannot be completed."""
        ...

    def whole(self, choices: list[Gathered], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
        ...


class OpenAIEvents:
    """What the streams of chat and completions have in common: data lines, a usage event on demand, [DONE]."""

    touches_others: ClassVar[bool] = False

    def __init__(self, usage_base: dict[str, Any] | None) -> None:
        self._usage_base = usage_base

    def opening(self) -> bytes:
        """Nothing: a chat's role goes with its first text, which is when clients stop the clock."""
        return b""

    def keep_alive(self) -> bytes:
        """A comment."""
        return KEEP_ALIVE

    def way(self, index: int) -> tuple[Way, int] | None:
        """None: every event needs all that came before it."""
        return None

    def passed(self, index: int, text: str, num_tokens: int, num_events: int) -> None:
        """Nothing to remember: an event tells no more than its text."""

    def closing(self, usage: Usage) -> bytes:
        """Usage, if it was asked for, and [DONE]."""
        if self._usage_base is None:
            return DONE
        return event({**self._usage_base, "choices": [], "usage": usage.as_json()}) + DONE

    def failure(self, error: RequestError) -> bytes:
        """The error body as one data line, which nothing follows."""
        return b"data: " + error_body(error) + EVENT_END


def event(payload: dict[str, Any]) -> bytes:
    """`data: {json}` with its empty line."""
    return b"data: " + encode(payload) + EVENT_END


def token_text(texts: TokenTexts, token_id: int) -> str:
    """A token's text; bytes that are not a whole character become U+FFFD."""
    return texts.token_bytes(token_id).decode("utf-8", "replace")


def prompt_logprobs_json(entries: list[TokenLogprob | None] | None, texts: TokenTexts) -> list[Any] | None:
    """vLLM's shape: for each position null or `{token id: {logprob, rank, decoded_token}}`."""
    if entries is None:
        return None
    result: list[Any] = []
    for entry in entries:
        if entry is None:
            result.append(None)
            continue
        position = {
            str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": token_text(texts, token_id)}
            for rank, (token_id, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1)
        }
        position[str(entry.token_id)] = {
            "logprob": entry.logprob,
            "rank": entry.rank,
            "decoded_token": token_text(texts, entry.token_id),
        }
        result.append(position)
    return result
