"""What the CPU's sampler remembers of each slot: the tables of the `sample` kernel, and words that must not come."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.batch import Int32Array, Int64Array
from tokenspeed.executor.edits import BadWords, has_penalties
from tokenspeed.executor.interface import Binding, Mask
from tokenspeed.executor.masks import num_words
from tokenspeed.kernels import ops, sampler_state
from tokenspeed.kernels.sampler_state import PROMPT, STOP

MIN_TEMPERATURE = 1e-6
"""Lower temperatures are raised to this: float32 logits this close together differ by rounding only."""


class Feature(enum.IntFlag):
    """What a slot asks of the sampler; a step does the work of the features that its rows have.

    HISTORY: its edits depend on the tokens sampled. SORTED_CUT: top_k or top_p. MASKED: each sample brings a mask. The
    kernels see the same bits.
    """

    RANDOM = sampler_state.RANDOM
    SORTED_CUT = sampler_state.SORTED_CUT
    MIN_P = sampler_state.MIN_P
    EDITS = sampler_state.EDITS
    HISTORY = sampler_state.HISTORY
    LOGPROBS = 32
    MASKED = sampler_state.MASKED

    CUT = SORTED_CUT | MIN_P


class SamplingTables:
    """Sampling state of `num_slots` slots; a slot's entries hold from `bind` to `release` or the next `bind`.

    `state` are the kernel's tables, `features` and `num_logprobs` int64 [slots]; `bad_words` those of slots that have
    words of several tokens. Tables as wide as the vocabulary cost memory where a slot has used them.
    """

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.num_slots = num_slots
        self.features: Int64Array = np.zeros(num_slots, dtype=np.int64)
        self.num_logprobs: Int64Array = np.zeros(num_slots, dtype=np.int64)
        self.bad_words: dict[int, BadWords] = {}
        widths = {"bias": vocab_size, "seen": vocab_size, "mask": num_words(vocab_size)}
        # numpy's zeros, unlike torch's, are pages of the system that cost nothing until they are written.
        self._columns: dict[str, npt.NDArray[Any]] = {
            name: np.zeros((num_slots + 1, widths[name]) if name in widths else num_slots + 1, _TYPES[name])
            for name in ops.SamplerState._fields
        }
        self.state = ops.SamplerState(*map(torch.from_numpy, self._columns.values()))

    def bind(self, slot: int, binding: Binding) -> None:
        """Give `slot` to a request; history is rebuilt from the tokens that it brings."""
        params, columns = binding.params, self._columns
        features = features_of(binding, self.vocab_size)
        self.features[slot] = columns["features"][slot] = features
        self.num_logprobs[slot] = params.logprobs or 0
        columns["top_k"][slot] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        columns["seed"][slot] = binding.seed
        columns["temperature"][slot] = max(params.temperature, MIN_TEMPERATURE)
        columns["top_p"][slot], columns["min_p"][slot] = params.top_p, params.min_p
        columns["repetition"][slot], columns["presence"][slot] = params.repetition_penalty, params.presence_penalty
        columns["frequency"][slot] = params.frequency_penalty
        columns["min_length"][slot] = binding.prompt_len + params.min_tokens
        self.bad_words.pop(slot, None)
        if features & Feature.EDITS:
            columns["bias"][slot], columns["seen"][slot] = edits_of(binding, self.vocab_size)
            sequences = [words for words in params.bad_word_ids if len(words) > 1]
            if sequences:
                self.bad_words[slot] = BadWords(sequences, binding.tokens)

    def release(self, slots: Sequence[int]) -> None:
        """Forget what these slots asked for."""
        for slot in slots:
            self.features[slot] = self._columns["features"][slot] = 0
            self.bad_words.pop(slot, None)

    def place(self, slots: Int64Array, positions: Int64Array) -> None:
        """Say where the next token of each of `slots` will stand."""
        self._columns["length"][slots] = positions

    def allow(self, slot: int, mask: Mask) -> None:
        """Only what `mask` allows is sampled next; None allows all."""
        self._columns["mask"][slot] = -1 if mask is None else mask


_TYPES: dict[str, type[np.generic]] = {
    **dict.fromkeys(("features", "top_k", "min_length", "seen", "mask"), np.int32),
    **dict.fromkeys(("seed", "length", "last_token"), np.int64),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition", "presence", "frequency", "bias"), np.float32),
}


def edits_of(binding: Binding, vocab_size: int) -> tuple[npt.NDArray[np.float32], Int32Array]:
    """The rows of `SamplerState`'s bias and seen of a request: bias, allowed tokens and bad words of one token; prompt,
    output and stop ids."""
    params, tokens = binding.params, binding.tokens
    bias = np.zeros(vocab_size, dtype=np.float32)
    if params.allowed_token_ids is not None:
        bias.fill(-np.inf)
        bias[list(params.allowed_token_ids)] = 0
    for token, value in params.logit_bias.items():
        bias[token] += value
    bias[[words[0] for words in params.bad_word_ids if len(words) == 1]] = -np.inf
    seen: Int32Array = np.bincount(tokens[binding.prompt_len :], minlength=vocab_size).astype(np.int32)
    seen[tokens[: binding.prompt_len]] |= PROMPT
    seen[binding.stop_ids] |= STOP
    return bias, seen


def features_of(binding: Binding, vocab_size: int) -> Feature:
    """The features that have an effect: a top_k of a greedy request has none."""
    params = binding.params
    random = not params.greedy
    history = has_penalties(params) or bool(params.bad_word_ids)
    edits = history or params.logit_bias or params.allowed_token_ids is not None or params.min_tokens > 0
    wanted = {
        Feature.RANDOM: random,
        Feature.SORTED_CUT: random and (0 < params.top_k < vocab_size or params.top_p < 1.0),
        Feature.MIN_P: random and params.min_p > 0.0,
        Feature.EDITS: bool(edits),
        Feature.HISTORY: history,
        Feature.LOGPROBS: params.logprobs is not None,
        Feature.MASKED: binding.masked,
    }
    return Feature(sum(flag for flag, on in wanted.items() if on))
