"""Everything about one request that is checked with the model at hand, before the engine sees it."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import SupportsIndex, cast

import msgspec

from tokenspeed.errors import ContextLengthExceeded, InvalidRequest
from tokenspeed.request import SamplingParams
from tokenspeed.text.spans import Span
from tokenspeed.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Sequence[Span]

LARGE_TEXT = 32_768
"""Characters from which a prompt is tokenized in a worker thread, off the event loop."""


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What is fixed once the engine is ready. `defaults` are the checkpoint's own sampling defaults."""

    model_name: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    defaults: dict[str, float]
    num_blocks: int
    block_size: int
    summary: str


def _token_id(item: object) -> int:
    """An integer of any kind, numpy's for example, but no boolean."""
    if isinstance(item, SupportsIndex) and not isinstance(item, bool):
        return operator.index(item)
    raise InvalidRequest(f"a prompt is a text, token ids or spans; it holds a {type(item).__name__}", param="prompt")


class Intake:
    """Turns what a caller asked into token ids and complete parameters, or raises `InvalidRequest`."""

    def __init__(self, tokenizer: Tokenizer, facts: EngineFacts, *, max_choices: int) -> None:
        self._tokenizer = tokenizer
        self._facts = facts
        self._max_choices = max_choices

    async def take(self, prompt: Prompt, params: SamplingParams) -> tuple[list[int], SamplingParams]:
        """The prompt's ids and the parameters with `max_tokens` and `bad_word_ids` filled in."""
        ids = await self._encode(prompt)
        field = "messages" if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Span) else "prompt"
        if not ids:
            raise InvalidRequest("the prompt is empty", param=field)
        last = self._facts.vocab_size - 1
        if min(ids) < 0 or max(ids) > last:
            wrong = next(token_id for token_id in ids if not 0 <= token_id <= last)
            raise InvalidRequest(f"{field} has token id {wrong}; the model has ids 0 to {last}", param=field)
        if params.n > self._max_choices:
            raise InvalidRequest(
                f"n is {params.n}, but this server queues at most {self._max_choices} requests", param="n"
            )
        if params.bad_words and not params.bad_word_ids:
            sequences = tuple(ids for word in params.bad_words for ids in self._spellings(word))
            params = msgspec.structs.replace(params, bad_word_ids=sequences)
        params.check(self._facts.vocab_size)
        self._check_something_is_allowed(params)
        limit = self._facts.max_model_len
        room = limit - len(ids)
        if room < (params.max_tokens or 1):
            raise ContextLengthExceeded(
                limit=limit, prompt=len(ids), completion=params.max_tokens or 1, param=field
            )
        if params.min_tokens > room:
            raise InvalidRequest(
                f"min_tokens is {params.min_tokens}, but the context has room for {room}", param="min_tokens"
            )
        if params.max_tokens is None:
            params = msgspec.structs.replace(params, max_tokens=room)
        return ids, params

    def _check_something_is_allowed(self, params: SamplingParams) -> None:
        """Before `min_tokens` the ids that end a request are masked, which may leave no allowed token."""
        if params.min_tokens and params.allowed_token_ids is not None:
            ending = {*params.stop_token_ids, *(() if params.ignore_eos else self._facts.eos_token_ids)}
            banned = {sequence[0] for sequence in params.bad_word_ids if len(sequence) == 1}
            if (ending | banned).issuperset(params.allowed_token_ids):
                raise InvalidRequest(
                    "min_tokens leaves no allowed token: each ends the request or is a bad word", param="min_tokens"
                )

    async def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if len(prompt) >= LARGE_TEXT:
                return await asyncio.to_thread(self._encode_text, prompt)
            return self._encode_text(prompt)
        kinds = set(map(type, prompt))
        if kinds == {int}:
            return list(cast(Sequence[int], prompt))
        if kinds == {Span}:
            spans = list(cast(Sequence[Span], prompt))
            if sum(len(span.text) for span in spans) >= LARGE_TEXT:
                return await asyncio.to_thread(self._tokenizer.encode_spans, spans)
            return self._tokenizer.encode_spans(spans)
        return [_token_id(item) for item in prompt]

    def _encode_text(self, prompt: str) -> list[int]:
        return self._tokenizer.encode(prompt, add_special_tokens=True, parse_special=False)

    def _spellings(self, word: str) -> set[tuple[int, ...]]:
        """A word's token sequences at the start of a text and after a space."""
        bare = word.lstrip()
        encoded = (
            tuple(self._tokenizer.encode(text, add_special_tokens=False, parse_special=False))
            for text in (bare, f" {bare}")
        )
        return {ids for ids in encoded if ids}
