"""What a request changes in its logits before a token is chosen: bias, penalties and masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from tokenspeed.batch import Int32Array, Int64Array
from tokenspeed.executor.interface import Binding
from tokenspeed.request import SamplingParams

Float32Array = npt.NDArray[np.float32]


class Edits:
    """The edits of one request, in their order: bias, penalties, masks.

    Costs what the request asks for: a bias its entries, penalties the distinct tokens seen, never a pass
    over the vocabulary (allowed_token_ids aside).
    """

    def __init__(self, binding: Binding) -> None:
        params = binding.params
        self._bias_ids = _ids(params.logit_bias)
        self._bias = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self._penalties = Penalties(params, binding.tokens, binding.prompt_len) if has_penalties(params) else None
        self._allowed = None if params.allowed_token_ids is None else _ids(params.allowed_token_ids)
        self._bad_words = BadWords(params.bad_word_ids, binding.tokens) if params.bad_word_ids else None
        self._stop_ids = binding.stop_ids
        self._min_length = binding.prompt_len + params.min_tokens

    def apply(self, logits: Float32Array, position: int) -> None:
        """Edit `logits` [V] of the token that will stand at `position`, in place."""
        if len(self._bias):
            logits[self._bias_ids] += self._bias
        if self._penalties is not None:
            self._penalties.apply(logits)
        if self._allowed is not None:
            kept = logits[self._allowed]
            logits.fill(-np.inf)
            logits[self._allowed] = kept
        if self._bad_words is not None:
            logits[self._bad_words.banned()] = -np.inf
        if position < self._min_length:
            logits[self._stop_ids] = -np.inf

    def append(self, token: int) -> None:
        """Take a sampled token into the history that penalties and bad words look at."""
        if self._penalties is not None:
            self._penalties.append(token)
        if self._bad_words is not None:
            self._bad_words.append(token)


class Penalties:
    """Counts of the distinct tokens that one request has seen.

    Repetition, over prompt and output: a positive logit is divided by the penalty, a negative one
    multiplied (Keskar et al., "CTRL", 2019, in the form of `transformers`). Presence and frequency, over
    the output: logit − presence · [count > 0] − frequency · count (OpenAI API reference).
    """

    def __init__(self, params: SamplingParams, tokens: Int32Array, prompt_len: int) -> None:
        self._repetition = params.repetition_penalty
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        ids, inverse = np.unique(tokens, return_inverse=True)
        self._seen = len(ids)
        self._place = {token: place for place, token in enumerate(ids.tolist())}
        self._ids = ids.astype(np.int64)
        self._counts = np.bincount(inverse[prompt_len:], minlength=len(ids)).astype(np.float32)

    def apply(self, logits: Float32Array) -> None:
        ids, counts = self._ids[: self._seen], self._counts[: self._seen]
        x = logits[ids]
        if self._repetition != 1.0:
            x = np.where(x > 0, x / self._repetition, x * self._repetition)
        logits[ids] = x - self._frequency * counts - self._presence * (counts > 0)

    def append(self, token: int) -> None:
        place = self._place.setdefault(token, self._seen)
        if place == self._seen:
            if place == len(self._ids):
                room = max(64, len(self._ids))
                self._ids = np.concatenate([self._ids, np.zeros(room, dtype=np.int64)])
                self._counts = np.concatenate([self._counts, np.zeros(room, dtype=np.float32)])
            self._ids[place] = token
            self._seen += 1
        self._counts[place] += 1


class BadWords:
    """Token sequences that one request must not produce, ordered so that a step looks up one tuple a length.

    A sequence's last token is banned while the known tokens, prompt included, end with the rest of it.
    """

    def __init__(self, sequences: Sequence[tuple[int, ...]], tokens: Int32Array) -> None:
        self._banned: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for *prefix, last in sequences:
            by_prefix = self._banned.setdefault(len(prefix), {})
            by_prefix.setdefault(tuple(prefix), []).append(last)
        self._longest = max(self._banned)
        self._tail: list[int] = tokens[max(0, len(tokens) - self._longest) :].tolist()

    def append(self, token: int) -> None:
        self._tail.append(token)
        del self._tail[: max(0, len(self._tail) - self._longest)]

    def banned(self) -> list[int]:
        """Tokens that must not come next."""
        ids: list[int] = []
        for length, by_prefix in self._banned.items():
            if length <= len(self._tail):
                ids += by_prefix.get(tuple(self._tail[len(self._tail) - length :]), ())
        return ids


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _ids(ids: Iterable[int]) -> Int64Array:
    return np.fromiter(ids, dtype=np.int64)
