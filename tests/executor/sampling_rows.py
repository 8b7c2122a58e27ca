"""Rows for the sampler's tests: a request, its history, the logits of its next token, and what it must get."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.executor.sampling_oracle import distribution, edited, number, possible_tokens
from tokenspeed.executor.interface import Binding
from tokenspeed.executor.sampler import Sampled, Sampler
from tokenspeed.executor.sampling_tables import SamplingTables
from tokenspeed.request import SamplingParams

VOCAB = 300
SLOTS = 16
GREEDY = SamplingParams(temperature=0.0)


class Row:
    """A request: its parameters, its history, and the logits of its next token."""

    def __init__(
        self,
        params: SamplingParams,
        logits: torch.Tensor,
        *,
        prompt: Sequence[int] = (1, 2, 3),
        output: Sequence[int] = (),
        seed: int = 0,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.params, self.logits, self.seed, self.stop_ids = params, logits, seed, list(stop_ids)
        self.prompt, self.output = list(prompt), list(output)

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.output)

    def binding(self) -> Binding:
        tokens = np.array(self.prompt + self.output, dtype=np.int32)
        return Binding(self.params, tokens, len(self.prompt), self.seed, np.array(self.stop_ids, dtype=np.int32))

    def expected(self) -> set[int]:
        x = edited(self.logits.tolist(), self.params, self.prompt, self.output, self.stop_ids)
        if self.params.greedy:
            return {int(x.argmax())}
        return possible_tokens(distribution(x, self.params), number(self.seed, self.position))


def new_sampler(vocab: int = VOCAB) -> tuple[SamplingTables, Sampler]:
    tables = SamplingTables(SLOTS, vocab)
    return tables, Sampler(tables)


def bind(tables: SamplingTables, slots: Sequence[int], rows: Sequence[Row]) -> None:
    for slot, row in zip(slots, rows, strict=True):
        tables.bind(slot, row.binding())


def sample(rows: Sequence[Row], slots: Sequence[int] | None = None) -> Sampled:
    at = list(range(len(rows))) if slots is None else list(slots)
    tables, sampler = new_sampler(len(rows[0].logits))
    bind(tables, at, rows)
    positions = np.array([row.position for row in rows], dtype=np.int64)
    return sampler.sample(torch.stack([row.logits for row in rows]), np.array(at, dtype=np.int64), positions)


def token(row: Row) -> int:
    return int(sample([row]).tokens[0])


def random_logits(seed: int, vocab: int = VOCAB, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def logits_of(probabilities: Sequence[float]) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()
