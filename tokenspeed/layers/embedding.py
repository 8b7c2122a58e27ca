"""Token embedding and the LM head, which may share one table."""

from __future__ import annotations

import torch

from tokenspeed.kernels import ops
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.parallel.cost import Work
from tokenspeed.parallel.placement import Boundary, Partial, Replicate, Shard
from tokenspeed.parallel.shards import Piece

VOCABULARY = "vocab"


class Embedding(Module):
    """Rows of a table [V, H] by token id. Over ranks each holds a slice of the vocabulary and gives zeros elsewhere."""

    boundary = Boundary(takes=Replicate(VOCABULARY), gives=Partial(VOCABULARY))

    def __init__(self, ctx: BuildContext, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        piece = Piece(ctx.name("weight"), (slice(None),))
        self.weight = self.declare_matrix(ctx, (vocab_size, hidden_size), [piece], Shard(VOCABULARY, 0))
        self.row_bytes = hidden_size * ctx.dtype.itemsize
        self._num_ranks = ctx.mesh.size(VOCABULARY)
        self._num_rows = ops.num_rows(self.weight)
        self._first = ctx.mesh.coordinate(ctx.rank, VOCABULARY) * self._num_rows
        self._apply_embedding = ops.embedding_of(ctx.target, self.weight)

    def work(self, tokens: int) -> Work:
        """A row a token, where it is at home."""
        return Work(weight_bytes=tokens * self.row_bytes)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] → [T, H]."""
        if self._num_ranks == 1:
            return self._apply_embedding(token_ids, self.weight)
        here = token_ids - self._first
        held = (here >= 0) & (here < self._num_rows)
        return self._apply_embedding(torch.where(held, here, 0), self.weight) * held.unsqueeze(-1)


class LMHead(Module):
    """Logits [S, V] in float32 of hidden states [S, H]; `tied` is the embedding's table where they share it."""

    boundary = Boundary(takes=Replicate(VOCABULARY), gives=Shard(VOCABULARY, -1))
    linear = True
    sampled_only = True

    def __init__(self, ctx: BuildContext, vocab_size: int, hidden_size: int, *, tied: ops.Matrix | None) -> None:
        super().__init__()
        if tied is None:
            piece = Piece(ctx.name("weight"), (slice(None),))
            tied = self.declare_matrix(ctx, (vocab_size, hidden_size), [piece], Shard(VOCABULARY, 0))
        self.weight = tied
        self.row_bytes = vocab_size * torch.float32.itemsize
        self._apply_lm_head = ops.lm_head_of(ctx.target, tied)
        self._numbers, self._bytes = ops.num_rows(tied) * hidden_size, ops.num_bytes(tied)

    def work(self, tokens: int) -> Work:
        """The table is read as a whole, also where it is the embedding's."""
        return Work(self._bytes, 2.0 * self._numbers * tokens)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, H] → [S, V] float32, V the part of the vocabulary that this rank has."""
        return self._apply_lm_head(hidden, self.weight)
