"""Requests that asked for the log-probabilities of their prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from tokenspeed.batch import Int32Array, Int64Array
from tokenspeed.executor.interface import Binding


@dataclass(frozen=True, slots=True)
class PromptScores:
    """The prompt of one such request, and how many most likely tokens it wants beside each of its own."""

    prompt: Int32Array
    k: int

    @classmethod
    def of(cls, binding: Binding) -> Self | None:
        """None if there is nothing to score: a request that has generated was given all scores before."""
        k = binding.params.prompt_logprobs
        return None if k is None or len(binding.tokens) != binding.prompt_len else cls(binding.tokens, k)

    def targets(self, computed: int, new: int) -> Int64Array:
        """The prompt tokens that follow `new` positions behind the first `computed`; fewer at the prompt's end."""
        return self.prompt[computed + 1 : computed + 1 + new].astype(np.int64)
