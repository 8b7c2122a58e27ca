"""What the sampler keeps of each slot, in tables on the device."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

RANDOM, SORTED_CUT, MIN_P, EDITS, HISTORY = (1 << bit for bit in range(5))
MASKED = 1 << 6
"""Bits of `SamplerState.features`: what a row needs. SORTED_CUT: top_k or top_p. HISTORY: its edits depend on
the tokens sampled. MASKED: only tokens of its `mask`; bit 5 is the executor's own. What
a row does not need is neutral in its table: top_k is 0, top_p 1, min_p 0."""

PROMPT, STOP = 1 << 28, 1 << 29
"""Bits of `SamplerState.seen` above the count: the token stands in the prompt; it is a stop id of the request."""

COUNT = PROMPT - 1


class SamplerState(NamedTuple):
    """Tables of N entries, the last of which no request ever has; V is the vocabulary.

    features [N] int32; temperature > 0, top_p, min_p, repetition, presence, frequency [N] float32; top_k,
    min_length [N] int32; seed, length, last_token [N] int64; bias [N,V] float32 (−inf: not allowed); seen [N,V]
    int32, how often a token was generated, with the bits PROMPT and STOP; mask [N,V/32] int32, a bit for each token
    that may be sampled, the lowest first.
    """

    features: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    min_length: Tensor
    seed: Tensor
    length: Tensor
    last_token: Tensor
    bias: Tensor
    seen: Tensor
    mask: Tensor
