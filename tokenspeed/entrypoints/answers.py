"""What every answer is made of: gathered choices, usage, and log-probabilities with the tokens' texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from tokenspeed.request import FinishReason, RequestOutput, TokenLogprob

EVENT_END = b"\n\n"

encode = msgspec.json.Encoder().encode


class TokenTexts(Protocol):
    """The part of a tokenizer that log-probabilities need."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for."""
        ...


@dataclass(slots=True)
class Usage:
    """Token counts of one answer; prompts are counted once, whatever n is."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        """OpenAI's usage object; cached_tokens is always there, 0 included."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Gathered:
    """One choice of an answer that is not streamed. `index` numbers choices over all prompts."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def add(self, output: RequestOutput) -> None:
        """Take in one delta."""
        self.texts.append(output.text)
        self.token_ids.extend(output.token_ids)
        self.logprobs.extend(output.logprobs or ())
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.stop_reason = output.stop_reason


class Answer(Protocol):
    """A way to write outputs down: chat or completion, as events or whole."""

    def event(self, index: int, output: RequestOutput) -> bytes:
        """One server-sent event for a delta of choice `index`; empty when the delta tells nothing yet."""
        ...

    def usage_event(self, usage: Usage) -> bytes:
        """The event that only tells usage, sent last when the client asked for it."""
        ...

    def whole(self, choices: list[Gathered], usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
        ...


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
