"""Linear layers, by how their weight lies over the ranks of an axis."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tokenspeed.kernels import ops
from tokenspeed.layers.module import BuildContext, Module, Piece
from tokenspeed.parallel.placement import Boundary, Partial, Placement, Replicate, Shard


def _stacked(ctx: BuildContext, rows: Mapping[str, int], kind: str) -> list[Piece]:
    """The checkpoint tensors `name`.`kind` of several projections, one below the other."""
    pieces: list[Piece] = []
    start = 0
    for name, size in rows.items():
        pieces.append(Piece(ctx.name(f"{name}.{kind}"), (slice(start, start + size),)))
        start += size
    return pieces


class _Linear(Module):
    def __init__(
        self,
        ctx: BuildContext,
        columns: int,
        rows: Mapping[str, int],
        *,
        bias: bool,
        weight_shard: Placement,
        bias_shard: Placement,
    ) -> None:
        super().__init__()
        total = sum(rows.values())
        self.linear = not bias
        self.weight = self.declare(ctx, (total, columns), _stacked(ctx, rows, "weight"), weight_shard)
        self.bias = self.declare(ctx, (total,), _stacked(ctx, rows, "bias"), bias_shard) if bias else None
        self._apply_linear = ops.linear(ctx.target)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, columns] → [T, rows]."""
        return self._apply_linear(x, self.weight, self.bias)


class ColumnLinear(_Linear):
    """y = x Wᵀ (+ b) with the rows of W over the ranks: every rank computes its own outputs.

    `rows` names the projections of the checkpoint that are fused, in order, with their sizes.
    """

    def __init__(self, ctx: BuildContext, columns: int, rows: Mapping[str, int], *, axis: str, bias: bool) -> None:
        super().__init__(ctx, columns, rows, bias=bias, weight_shard=Shard(axis, 0), bias_shard=Shard(axis, 0))
        self.boundary = Boundary(takes=Replicate(axis), gives=Shard(axis, -1))


class RowLinear(_Linear):
    """y = x Wᵀ (+ b) with the columns of W over the ranks: every rank computes a term of the sum."""

    def __init__(self, ctx: BuildContext, columns: int, rows: Mapping[str, int], *, axis: str, bias: bool) -> None:
        super().__init__(ctx, columns, rows, bias=bias, weight_shard=Shard(axis, 1), bias_shard=Replicate(axis))
        self.boundary = Boundary(takes=Shard(axis, -1), gives=Partial(axis))
