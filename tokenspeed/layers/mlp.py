"""The gated feed-forward block."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tokenspeed.kernels import ops
from tokenspeed.layers.linear import ColumnLinear, RowLinear
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.parallel.placement import Boundary, Partial, Replicate, Shard


class SiluMul(Module):
    """silu(gate) · up of [gate | up]."""

    def __init__(self, ctx: BuildContext, *, axis: str) -> None:
        super().__init__()
        self.boundary = Boundary(takes=Shard(axis, -1), gives=Shard(axis, -1))
        self._apply_silu_mul = ops.silu_mul(ctx.target)

    def forward(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[T, 2I] → [T, I]."""
        return self._apply_silu_mul(gate_up)


class GatedMLP(Module):
    """down(silu(gate(x)) · up(x)) (Shazeer, 2020), gate and up fused into one product."""

    def __init__(
        self, ctx: BuildContext, hidden_size: int, intermediate_size: int, *, axis: str = "dense", bias: bool = False
    ) -> None:
        super().__init__()
        self.boundary = Boundary(takes=Replicate(axis), gives=Partial(axis))
        rows = {"gate_proj": intermediate_size, "up_proj": intermediate_size}
        self.gate_up_proj = ColumnLinear(ctx, hidden_size, rows, axis=axis, bias=bias)
        self.activation = SiluMul(ctx, axis=axis)
        self.down_proj = RowLinear(ctx, intermediate_size, {"down_proj": hidden_size}, axis=axis, bias=bias)
        self.row_bytes = hidden_size * ctx.dtype.itemsize
        self.intermediate_size = intermediate_size // ctx.mesh.size(axis)
        self.weights_of_block = ops.MlpWeights(
            gate_up=self.gate_up_proj.weight,
            gate_up_bias=self.gate_up_proj.bias,
            down=self.down_proj.weight,
            down_bias=self.down_proj.bias,
        )
        self._block = ops.mlp_block_decode(
            ctx.target,
            hidden_size=hidden_size,
            intermediate_size=self.intermediate_size,
            gate_up_form=ops.form_of(self.gate_up_proj.weight),
            down_form=ops.form_of(self.down_proj.weight),
        )

    def stages(self) -> Iterable[tuple[str, Module]]:
        return (
            ("gate_up_proj", self.gate_up_proj),
            ("activation", self.activation),
            ("down_proj", self.down_proj),
        )

    def forward(self, x: torch.Tensor, num_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """[T, H] → [T, H]. What rows from `num_tokens` on give is of no interest, as in `decode`."""
        out: torch.Tensor = self.down_proj(self.activation(self.gate_up_proj(x)))
        return out

    def decode(
        self, x: torch.Tensor, norm: RMSNorm | None, residual: torch.Tensor | None, num_tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A step of decode rows alone, from before the norm: x and residual [R, H] → (what the block adds,
        x + residual). Without a norm x is normed already, and nothing else comes back. What rows from `num_tokens` on
        give is of no interest; here they cost nothing, as weights are read once for all rows."""
        return self._block(x, None if norm is None else norm.edge(residual), self.weights_of_block)
