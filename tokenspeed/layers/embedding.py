"""Token embedding and the LM head, which may share one table."""

from __future__ import annotations

import torch
from torch import nn

from tokenspeed.kernels import ops
from tokenspeed.layers.module import BuildContext, Module, Piece
from tokenspeed.parallel.placement import Boundary, Partial, Replicate, Shard

VOCABULARY = "vocab"


class Embedding(Module):
    """Rows of a table [V, H] by token id. Over ranks each holds a slice of the vocabulary and gives zeros elsewhere."""

    boundary = Boundary(takes=Replicate(VOCABULARY), gives=Partial(VOCABULARY))

    def __init__(self, ctx: BuildContext, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        piece = Piece(ctx.name("weight"), (slice(None),))
        self.weight = self.declare(ctx, (vocab_size, hidden_size), [piece], Shard(VOCABULARY, 0))
        self._apply_embedding = ops.embedding(ctx.target)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids [T] → [T, H]."""
        return self._apply_embedding(token_ids, self.weight)


class LMHead(Module):
    """Logits [S, V] in float32 of hidden states [S, H]; `tied` is the embedding's table where they share it."""

    boundary = Boundary(takes=Replicate(VOCABULARY), gives=Shard(VOCABULARY, -1))
    linear = True

    def __init__(self, ctx: BuildContext, vocab_size: int, hidden_size: int, *, tied: nn.Parameter | None) -> None:
        super().__init__()
        if tied is None:
            piece = Piece(ctx.name("weight"), (slice(None),))
            self.weight = self.declare(ctx, (vocab_size, hidden_size), [piece], Shard(VOCABULARY, 0))
        else:
            self.weight = tied
        self._apply_linear = ops.linear(ctx.target)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [S, H] → [S, V] float32."""
        return self._apply_linear(hidden, self.weight, None).float()
