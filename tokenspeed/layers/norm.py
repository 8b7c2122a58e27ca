"""RMS norm, with the residual stream that it sits on."""

from __future__ import annotations

import torch

from tokenspeed.kernels import ops
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.parallel.placement import AnyTokens, Boundary, Replicate
from tokenspeed.parallel.shards import Piece


class RMSNorm(Module):
    """y = x / √(mean(x²) + eps) · weight (Zhang and Sennrich, 2019), the mean over the hidden size.

    On the residual stream it has no `axis`: it works on each token by itself, so the compiler chooses where.
    """

    def __init__(self, ctx: BuildContext, hidden_size: int, eps: float, *, axis: str | None = None) -> None:
        super().__init__()
        lies = AnyTokens() if axis is None else Replicate(axis)
        self.boundary = Boundary(takes=lies, gives=lies)
        self.row_bytes = hidden_size * ctx.dtype.itemsize
        self.eps = eps
        self.weight = self.declare(ctx, (hidden_size,), [Piece(ctx.name("weight"), (slice(None),))], lies)
        self._apply_norm = ops.rms_norm(ctx.target)
        # In a tuple: `edge` is called in every layer of a step, and torch looks for a module's parameters for 1 µs.
        self._first_edge = ops.Edge(self.weight, eps, None)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H], residual [T, H] or None → (norm(x + residual), x + residual)."""
        return self._apply_norm(x, self.weight, self.eps, residual)

    def edge(self, residual: torch.Tensor | None) -> ops.Edge:
        """This norm and the stream so far, for a block that begins with them."""
        first = self._first_edge
        return first if residual is None else ops.Edge(first.gain, first.eps, residual)
