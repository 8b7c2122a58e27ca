"""What one forward pass is told, in device tensors: arguments, not ambient context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one layer keeps per token: a name and a shape for each tensor, e.g. k and v of [heads, dim]."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    def elements(self) -> int:
        """Elements a token."""
        total = 0
        for _, shape in self.tensors:
            size = 1
            for dim in shape:
                size *= dim
            total += size
        return total


LayerKV = tuple[torch.Tensor, ...]
"""The cache of one layer, in the order of its `KVSpec`: each [num_blocks, block_size, *shape]."""


class Places(Protocol):
    """Where tokens stand and where their KV goes, as in `ForwardInput`."""

    @property
    def positions(self) -> torch.Tensor: ...

    @property
    def kv_slots(self) -> torch.Tensor: ...


class TokenInput(NamedTuple):
    """T tokens as everything but attention sees them; fields as in `ForwardInput`. With `num_tokens` [1] int32 those
    from there on are padding, whose `kv_slots` are −1."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    num_tokens: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ForwardInput:
    """R rows with T tokens in all; the first `num_decode` rows have one token each and come first.

    `token_ids` [T] int64, `positions` [T] int64; `kv_slots` [T] int64: where each token's KV goes,
    block × block_size + offset; `query_start` [R+1] int32: row r owns tokens query_start[r] to
    query_start[r+1]; `kv_len` [R] int32: length of row r including this step's tokens;
    `block_table` [R, max_blocks] int32, entries past a row's length are undefined.
    `query_lens` and `kv_lens` are the same numbers on the host, as Python ints (upper bounds on a GPU).
    `num_tokens` [1] int32: how many tokens of a captured decode step are none of its padding, which comes last;
    None: all of them, in a step that is not captured. Over ranks `padded_tokens` is the largest T of all groups of
    ranks that attend together, each of which has rows of its own, perhaps none; None: all of them have T. All ranks
    are told the same number, and the same of whether the step is captured.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_slots: torch.Tensor
    query_start: torch.Tensor
    kv_len: torch.Tensor
    block_table: torch.Tensor
    num_decode: int
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    block_size: int
    num_tokens: torch.Tensor | None = None
    padded_tokens: int | None = None

    @property
    def tokens(self) -> TokenInput:
        return TokenInput(self.token_ids, self.positions, self.kv_slots, self.num_tokens)
