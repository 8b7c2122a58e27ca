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

The kernel `sample` does 2 to 6 for all rows in one call, bad words of several tokens aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tokenspeed.batch import NOT_FINITE, Int32Array, Int64Array, Logprobs
from tokenspeed.executor import logprobs
from tokenspeed.executor.interface import Mask
from tokenspeed.executor.sampling_tables import Feature, SamplingTables
from tokenspeed.kernels import ops
from tokenspeed.kernels.platform import Platform


@dataclass(frozen=True, slots=True)
class Sampled:
    """`tokens` [S] int32, `NOT_FINITE` where none could be sampled; `logprobs` None when no row asked."""

    tokens: Int32Array
    logprobs: Logprobs | None


class Sampler:
    """Samples for the slots of `tables`. One thread at a time."""

    def __init__(self, tables: SamplingTables) -> None:
        self._tables = tables
        self._sample = ops.sample(ops.Target(Platform.of(torch.device("cpu")), torch.float32))

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
        raw: torch.Tensor | None = None
        if wanted & Feature.LOGPROBS:
            raw = torch.log_softmax(logits[torch.from_numpy(np.flatnonzero(features & Feature.LOGPROBS))], 1)
        words_of = tables.bad_words
        forbidding = [(row, words_of[slot]) for row, slot in enumerate(slots.tolist()) if slot in words_of]
        for row, words in forbidding:
            logits[row].numpy()[words.banned()] = -np.inf
        if masks or wanted & Feature.MASKED:
            for slot, mask in zip(slots[features & Feature.MASKED != 0].tolist(), masks, strict=True):
                tables.allow(slot, mask)
        tables.place(slots, positions)
        tokens: Int32Array = self._sample(logits, torch.from_numpy(slots.astype(np.int32)), tables.state).numpy()
        for row, words in forbidding:
            if tokens[row] >= 0:
                words.append(int(tokens[row]))
        found = None if raw is None else self._logprobs(raw, np.maximum(tokens, 0).astype(np.int64), slots, features)
        return Sampled(np.where(tokens < 0, np.int32(NOT_FINITE), tokens), found)

    def _logprobs(self, raw: torch.Tensor, tokens: Int64Array, slots: Int64Array, features: Int64Array) -> Logprobs:
        rows = np.flatnonzero(features & Feature.LOGPROBS)
        k = int(self._tables.num_logprobs[slots[rows]].max())
        return logprobs.spread(logprobs.pick(raw, torch.from_numpy(tokens[rows]), k), rows, tokens)
