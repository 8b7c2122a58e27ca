"""RMS norm, with the residual stream that it sits on."""

from __future__ import annotations

import torch

from tokenspeed.kernels import ops
from tokenspeed.layers.module import BuildContext, Module, Piece
from tokenspeed.parallel.placement import Boundary, Replicate


class RMSNorm(Module):
    """y = x / √(mean(x²) + eps) · weight (Zhang and Sennrich, 2019), the mean over the hidden size."""

    def __init__(self, ctx: BuildContext, hidden_size: int, eps: float, *, axis: str) -> None:
        super().__init__()
        self.boundary = Boundary(takes=Replicate(axis), gives=Replicate(axis))
        self.eps = eps
        self.weight = self.declare(ctx, (hidden_size,), [Piece(ctx.name("weight"), (slice(None),))], Replicate(axis))
        self._apply_norm = ops.rms_norm(ctx.target)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H], residual [T, H] or None → (norm(x + residual), x + residual)."""
        return self._apply_norm(x, self.weight, self.eps, residual)
