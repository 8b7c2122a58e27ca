"""sample: launcher of sampling.h, all rows of a step in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect_contiguous
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.sampler_state import SamplerState

_TYPES = {
    "features": torch.int32, "top_k": torch.int32, "min_length": torch.int32, "seed": torch.int64,
    "length": torch.int64, "last_token": torch.int64, "seen": torch.int32, "mask": torch.int32,
}  # fmt: skip


class Sample:
    """The tables' addresses are taken in the first call with them: they may not move afterwards."""

    def __init__(self, kernels: _ops.Kernels) -> None:
        self._kernels = kernels
        self._state: SamplerState | None = None
        self._vocab = 0
        self._tables: _ops.SamplerTables

    def __call__(self, logits: Tensor, slots: Tensor, state: SamplerState, /) -> Tensor:
        if state is not self._state:
            self._prepare(state)
        rows = slots.shape[0]
        expect_contiguous("logits", logits, torch.float32, (rows, self._vocab))
        expect_contiguous("slots", slots, torch.int32, (rows,))
        tokens = torch.empty(rows, dtype=torch.int32)
        self._tables.sample(logits.data_ptr(), slots.data_ptr(), tokens.data_ptr(), rows, torch.get_num_threads())
        return tokens

    def _prepare(self, state: SamplerState) -> None:
        num_slots, vocab = state.bias.shape
        if not vocab:
            raise ValueError("a vocabulary without tokens")
        words = -(-vocab // 32)
        wide = {"bias": vocab, "seen": vocab, "mask": words}
        for name, table in state._asdict().items():
            shape = (num_slots, wide[name]) if name in wide else (num_slots,)
            expect_contiguous(name, table, _TYPES.get(name, torch.float32), shape)
        self._tables = _ops.SamplerTables(
            self._kernels, num_slots, vocab, words, *(table.data_ptr() for table in state)
        )
        self._state, self._vocab = state, vocab


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    return Sample(kernels)
