"""What one row's next token must be: plain Python and float64, one row at a time, written from the definitions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tokenspeed.request import SamplingParams

Float64Array = npt.NDArray[np.float64]
WORD = 2**64


def number(seed: int, position: int) -> float:
    """SplitMix64 in Python's integers: output `position` + 1 of the stream that starts at mix(seed)."""

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        return z ^ (z >> 31)

    state = (mix(seed % WORD) + (position + 1) * 0x9E3779B97F4A7C15) % WORD
    return (mix(state) >> 11) / 2**53


def edited(
    logits: Sequence[float], params: SamplingParams, prompt: list[int], output: list[int], stop_ids: Sequence[int] = ()
) -> Float64Array:
    """Logits after bias, penalties and masks."""
    x = np.array(logits, dtype=np.float64)
    for token, bias in params.logit_bias.items():
        x[token] += bias
    for token in set(prompt + output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.presence_penalty + params.frequency_penalty * output.count(token)
    for token in range(len(x)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            x[token] = -np.inf
        if token in stop_ids and len(output) < params.min_tokens:
            x[token] = -np.inf
    known = prompt + output
    for *prefix, last in params.bad_word_ids:
        if known[len(known) - len(prefix) :] == prefix:
            x[last] = -np.inf
    return x


def distribution(x: Float64Array, params: SamplingParams) -> Float64Array:
    """Probabilities [V] after temperature, min_p, top_k and top_p, in this order; each keeps ties of its last."""
    p = np.exp((x - x.max()) / params.temperature)
    p[p < params.min_p] = 0.0
    if params.top_k > 0:
        p[p < np.sort(p)[::-1][min(params.top_k, len(p)) - 1]] = 0.0
    if params.top_p < 1.0:
        held, target = 0.0, params.top_p * p.sum()
        for least in np.sort(p)[::-1]:
            held += least
            if held >= target:
                p[p < least] = 0.0
                break
    result: Float64Array = p / p.sum()
    return result


def possible_tokens(p: Float64Array, u: float, slack: float = 1e-6) -> set[int]:
    """The tokens whose interval of the cumulative distribution holds u, or comes within `slack` of it."""
    high = np.cumsum(p)
    low = high - p
    return set(np.flatnonzero((p > 0) & (low - slack <= u) & (u < high + slack)).tolist())
