"""Tokens from logits on a CPU, for a batch in which every row may ask for something else.

A row's next token is decided in this order:

1. log-probabilities are taken from the model's own logits;
2. logit_bias is added; penalties are applied (repetition over prompt and output, presence and frequency
   over the output);
3. masks: allowed_token_ids, bad words, stop ids before min_tokens; then the mask of its grammar;
4. temperature 0: the most likely token, the lowest id among equals;
5. else p = exp((logit − max) / temperature), and what is less likely than the row's cut is dropped:
   min_p keeps p ≥ min_p × max p; top_k then keeps the k most likely; top_p then keeps the most likely
   tokens until they hold top_p of the mass that is left, the one that reaches it included. All three
   keep every token exactly as likely as the last one kept, so the cut is one number a row;
6. the token is the first, in vocabulary order, whose cumulative probability exceeds the uniform number
   of (seed, position).

Every step is a function of the row alone, so a row's token does not depend on its neighbours. A row whose
logits hold NaN or +inf or are all −inf, and a row whose masks leave no token, gets `NOT_FINITE`.

Passes over the vocabulary run in torch; what is small runs in numpy, whose calls cost a third of torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.batch import NOT_FINITE, Int32Array, Int64Array, Logprobs
from tokenspeed.executor import logprobs
from tokenspeed.executor.counter_random import uniform
from tokenspeed.executor.interface import Mask
from tokenspeed.executor.masks import forbidden
from tokenspeed.executor.sampling_tables import Feature, SamplingTables

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

CHUNK = 128
"""Tokens that one partial sum covers. A plain cumulative sum over 16 × 49,152 float64 took 5 ms."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """`tokens` [S] int32, `NOT_FINITE` where none could be sampled; `logprobs` None when no row asked."""

    tokens: Int32Array
    logprobs: Logprobs | None


class Sampler:
    """Samples for the slots of `tables`. One thread at a time."""

    def __init__(self, tables: SamplingTables) -> None:
        self._tables = tables
        padded = -(-tables.vocab_size // CHUNK) * CHUNK
        # Columns past the vocabulary stay zero. calloc: a row costs memory once it is used.
        self._probs = torch.from_numpy(np.zeros((tables.num_slots, padded), dtype=np.float32))

    def sample(
        self, logits: torch.Tensor, slots: Int64Array, positions: Int64Array, masks: Sequence[Mask] = ()
    ) -> Sampled:
        """Choose a token for each row of `logits` [S, V], contiguous float32, which is overwritten.

        `slots` [S] are the rows' slots, distinct; `positions` [S] is where the new token will stand in
        its sequence. The tokens join the slots' histories. `masks` are those of the slots with `Feature.MASKED`, in
        the order of the rows.
        """
        tables = self._tables
        features = tables.features[slots]
        wanted = int(np.bitwise_or.reduce(features, initial=0))
        best: Float32Array = logits.amax(1).numpy()
        usable = np.isfinite(best)
        raw: torch.Tensor | None = None
        if wanted & Feature.LOGPROBS:
            raw = torch.log_softmax(logits[torch.from_numpy(np.flatnonzero(features & Feature.LOGPROBS))], 1)
        if wanted & Feature.EDITS:
            rows: Float32Array = logits.numpy()
            for row in np.flatnonzero(features & Feature.EDITS).tolist():
                tables.edits[int(slots[row])].apply(rows[row], int(positions[row]))
        for row, mask in zip(np.flatnonzero(features & Feature.MASKED).tolist(), masks, strict=True):
            if mask is not None:
                np.copyto(logits[row].numpy(), -np.inf, where=forbidden(mask, tables.vocab_size))
        if wanted & (Feature.EDITS | Feature.MASKED):
            best = logits.amax(1).numpy()
            usable &= np.isfinite(best)
        random = features & Feature.RANDOM != 0
        # 5 µs a row of 49,152; torch.argmax takes 50.
        tokens = np.zeros(len(slots), dtype=np.int64) if random.all() else logits.numpy().argmax(1)
        drawn = np.flatnonzero(random & usable)
        if len(drawn):
            tokens[drawn] = self._draw(logits, best, drawn, slots[drawn], positions[drawn])
        if wanted & Feature.HISTORY:
            for row in np.flatnonzero((features & Feature.HISTORY != 0) & usable).tolist():
                tables.edits[int(slots[row])].append(int(tokens[row]))
        found = None if raw is None else self._logprobs(raw, tokens, slots, features)
        return Sampled(np.where(usable, tokens, NOT_FINITE).astype(np.int32), found)

    def _logprobs(self, raw: torch.Tensor, tokens: Int64Array, slots: Int64Array, features: Int64Array) -> Logprobs:
        rows = np.flatnonzero(features & Feature.LOGPROBS)
        k = int(self._tables.num_logprobs[slots[rows]].max())
        return logprobs.spread(logprobs.pick(raw, torch.from_numpy(tokens[rows]), k), rows, tokens)

    def _draw(
        self, logits: torch.Tensor, best: Float32Array, rows: Int64Array, slots: Int64Array, positions: Int64Array
    ) -> Int64Array:
        """Tokens [Q] of `rows` [Q] of `logits`, whose largest logits `best[rows]` are finite."""
        tables = self._tables
        probs = self._probs[: len(rows)]
        values = probs[:, : logits.shape[1]]
        temperature = tables.temperature[slots].astype(np.float32)
        torch.index_select(logits, 0, torch.from_numpy(rows), out=values)
        values.sub_(torch.from_numpy(best[rows, None])).div_(torch.from_numpy(temperature[:, None])).exp_()
        features = tables.features[slots]
        if np.any(features & Feature.CUT):
            cut = tables.min_p[slots].astype(np.float32)
            for row in np.flatnonzero(features & Feature.SORTED_CUT).tolist():
                slot = slots[row]
                cut[row] = least_kept(
                    probs[row], int(tables.top_k[slot]), float(tables.top_p[slot]), float(tables.min_p[slot])
                )
            values.masked_fill_(values < torch.from_numpy(cut[:, None]), 0.0)
        return inverse_cdf(probs, uniform(tables.seed[slots], positions))


def least_kept(probs: torch.Tensor, top_k: int, top_p: float, min_p: float) -> float:
    """The least probability that min_p, top_k (0 = off) and top_p keep of `probs` [a multiple of CHUNK].

    `probs` is float32, not normalised, its largest exactly 1. Only tokens that may be kept are sorted: a
    nucleus holds none below (1 − top_p) / V of the mass, because all those together weigh less than what
    it leaves out; and k tokens are at least as likely as the k-th of the chunks' most likely ones.
    """
    row: Float32Array = probs.numpy()
    chunks = probs.view(-1, CHUNK)
    cut = float(np.float32(min_p))
    floor, mass = cut, None
    if 0 < top_k <= len(chunks):
        most_likely: Float32Array = chunks.amax(1).numpy()
        floor = max(floor, float(np.partition(most_likely, len(chunks) - top_k)[len(chunks) - top_k]))
    elif top_k == 0 and min_p == 0.0:
        mass = float(cumulative_chunks(probs[None])[0, -1])
        floor = min((1.0 - top_p) * mass / len(row), 1.0)
    candidates = np.sort(row[row >= floor])[::-1]
    if top_k > 0:
        cut = max(cut, float(candidates[min(top_k, len(candidates)) - 1]))
        candidates = candidates[candidates >= cut]
    if top_p < 1.0:
        held = np.cumsum(candidates, dtype=np.float64)
        reached = int(np.searchsorted(held, top_p * (held[-1] if mass is None else mass)))
        cut = max(cut, float(candidates[min(reached, len(candidates) - 1)]))
    return cut


def inverse_cdf(probs: torch.Tensor, number: Float64Array) -> Int64Array:
    """The first token of each row of `probs` [Q, padded] whose cumulative mass exceeds `number` [Q] × the row's."""
    mass = cumulative_chunks(probs)
    target = number * mass[:, -1]
    chunk = (mass <= target[:, None]).sum(1)
    at = np.arange(len(probs))
    before = np.where(chunk > 0, mass[at, chunk - 1], 0.0)
    inside: Float32Array = probs.numpy().reshape(len(probs), -1, CHUNK)[at, chunk]
    within = np.cumsum(inside, axis=1, dtype=np.float64)
    # A chunk's float32 sum may exceed its cumulative float64: the search still ends on its last positive step.
    inner = np.minimum(target - before, np.nextafter(within[:, -1], 0.0))
    offset = (within <= inner[:, None]).sum(1)
    token: Int64Array = chunk * CHUNK + offset
    return token


def cumulative_chunks(probs: torch.Tensor) -> Float64Array:
    """Cumulative mass [Q, padded / CHUNK] of `probs` [Q, padded]; a chunk's own sum is float32."""
    sums = probs.view(len(probs), -1, CHUNK).sum(2).numpy()
    mass: Float64Array = np.cumsum(sums, axis=1, dtype=np.float64)
    return mass
