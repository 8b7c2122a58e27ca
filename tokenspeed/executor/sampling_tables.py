"""What the sampler remembers of each slot: parameters as tables, and the edits of those who have any."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tokenspeed.batch import Int64Array
from tokenspeed.executor.edits import Edits, has_penalties
from tokenspeed.executor.interface import Binding
from tokenspeed.kernels import sampler_state

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

    `temperature`, `top_p`, `min_p` float64, `top_k` (0 = off), `seed`, `num_logprobs` and `features` int64,
    each [slots].
    """

    def __init__(self, num_slots: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.num_slots = num_slots
        self.features: Int64Array = np.zeros(num_slots, dtype=np.int64)
        self.top_k: Int64Array = np.zeros(num_slots, dtype=np.int64)
        self.seed: Int64Array = np.zeros(num_slots, dtype=np.int64)
        self.num_logprobs: Int64Array = np.zeros(num_slots, dtype=np.int64)
        self.temperature: npt.NDArray[np.float64] = np.ones(num_slots)
        self.top_p: npt.NDArray[np.float64] = np.ones(num_slots)
        self.min_p: npt.NDArray[np.float64] = np.zeros(num_slots)
        self.edits: dict[int, Edits] = {}

    def bind(self, slot: int, binding: Binding) -> None:
        """Give `slot` to a request; history is rebuilt from the tokens that it brings."""
        params = binding.params
        features = features_of(binding, self.vocab_size)
        self.features[slot] = features
        self.top_k[slot] = params.top_k if 0 < params.top_k < self.vocab_size else 0
        self.seed[slot] = binding.seed
        self.num_logprobs[slot] = params.logprobs or 0
        self.temperature[slot] = max(params.temperature, MIN_TEMPERATURE)
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        if features & Feature.EDITS:
            self.edits[slot] = Edits(binding)
        else:
            self.edits.pop(slot, None)

    def release(self, slots: Sequence[int]) -> None:
        """Forget what these slots asked for."""
        for slot in slots:
            self.features[slot] = 0
            self.edits.pop(slot, None)


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
