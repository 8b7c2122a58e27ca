"""A model whose logits depend on every earlier (token, position), read through the block table.

One wrong block, slot, length, position or token anywhere before a position changes all its logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tokenspeed.layers.forward import ForwardInput, KVSpec, LayerKV

VOCAB = 97


class HashModel:
    """Keeps one number a token, (31 token + 17 position) mod 997, in the second of two layers."""

    def __init__(self) -> None:
        self.kv_spec = [KVSpec((("unused", (2, 3)),)), KVSpec((("number", (1,)), ("copy", (2,))))]
        self.inputs: list[ForwardInput] = []
        self.pieces = None

    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        self.inputs.append(inputs)
        numbers, copies = kv[1]
        assert 0 <= int(inputs.token_ids.min()) <= int(inputs.token_ids.max()) < VOCAB
        written = (31 * inputs.token_ids + 17 * inputs.positions) % 997
        if inputs.num_tokens is not None:
            there = inputs.kv_len > 0
            assert there.sum() == inputs.num_tokens and there[: int(inputs.num_tokens)].all()
        stored = inputs.kv_slots >= 0
        numbers.view(-1, 1)[inputs.kv_slots[stored]] = written[stored, None].to(numbers.dtype)
        copies.view(-1, 2)[inputs.kv_slots[stored]] = written[stored, None].to(copies.dtype)
        hidden = []
        for row, (new, length) in enumerate(zip(inputs.query_lens, inputs.kv_len.tolist(), strict=True)):
            if length == 0:
                hidden.append(0)  # the padding of a captured step
                continue
            blocks = inputs.block_table[row, : -(-length // inputs.block_size)].long()
            seen = numbers[blocks].reshape(-1)[:length]
            assert torch.equal(seen, copies[blocks].reshape(-1, 2)[:length, 1])
            hidden += [_digest(seen[: at + 1].long().tolist()) for at in range(length - new, length)]
        return torch.tensor(hidden, dtype=torch.float32)[:, None]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.stack([_logits(int(digest)) for digest in hidden[:, 0].tolist()])


def direct_logits(tokens: Sequence[int]) -> torch.Tensor:
    """Logits [V] after `tokens`, computed without any cache."""
    return _logits(_digest([(31 * token + 17 * at) % 997 for at, token in enumerate(tokens)]))


def _digest(numbers: Sequence[int]) -> int:
    digest = 0
    for number in numbers:
        digest = (digest * 5 + number + 1) % 99_991
    return digest


def _logits(digest: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(digest).normal(size=VOCAB).astype(np.float32) * 2)
