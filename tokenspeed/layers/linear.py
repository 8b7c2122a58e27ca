"""Linear layers, by how their weight lies over the ranks of an axis."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from tokenspeed.kernels import ops
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.parallel.placement import Boundary, Partial, Replicate, Shard
from tokenspeed.parallel.shards import Piece, Share


def _stacked(ctx: BuildContext, rows: Mapping[str, int], kind: str, shared_by: Mapping[str, int]) -> list[Piece]:
    """The checkpoint tensors `name`.`kind` of several projections, one below the other."""
    pieces: list[Piece] = []
    start = 0
    for name, size in rows.items():
        at = (slice(start, start + size),)
        pieces.append(Piece(ctx.name(f"{name}.{kind}"), at, shared_by=shared_by.get(name, 1)))
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
        weight_share: Share,
        bias_share: Share,
        shared_by: Mapping[str, int],
    ) -> None:
        super().__init__()
        total = sum(rows.values())
        self.linear = not bias
        weights, biases = (_stacked(ctx, rows, kind, shared_by) for kind in ("weight", "bias"))
        self.weight = self.declare_matrix(ctx, (total, columns), weights, weight_share)
        self.bias = self.declare(ctx, (total,), biases, bias_share) if bias else None
        self._apply_linear = ops.linear_of(ctx.target, self.weight)

    @property
    def plain(self) -> torch.Tensor:
        """The weight [rows, columns], for a block that takes no packed one; such a model has none."""
        assert isinstance(self.weight, torch.Tensor), "a packed weight in a block that takes rows"
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, columns] → [T, rows]."""
        return self._apply_linear(x, self.weight, self.bias)


class ColumnLinear(_Linear):
    """y = x Wᵀ (+ b) with the rows of W over the ranks: every rank computes its own outputs.

    `rows` names the projections of the checkpoint that are fused, in order, with their sizes over all ranks;
    `shared_by` those of which so many neighbouring ranks have the same part.
    """

    def __init__(
        self,
        ctx: BuildContext,
        columns: int,
        rows: Mapping[str, int],
        *,
        axis: str,
        bias: bool,
        shared_by: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        cut = Shard(axis, 0)
        super().__init__(ctx, columns, rows, bias=bias, weight_share=cut, bias_share=cut, shared_by=shared_by)
        self.boundary = Boundary(takes=Replicate(axis), gives=Shard(axis, -1))


class ReplicatedLinear(_Linear):
    """y = x Wᵀ (+ b), the same on every rank: for projections too small to cut. `rows` as in `ColumnLinear`."""

    def __init__(self, ctx: BuildContext, columns: int, rows: Mapping[str, int], *, axis: str, bias: bool) -> None:
        whole = Replicate(axis)
        super().__init__(ctx, columns, rows, bias=bias, weight_share=whole, bias_share=whole, shared_by={})
        self.boundary = Boundary(takes=Replicate(axis), gives=Replicate(axis))


class RowLinear(_Linear):
    """y = x Wᵀ (+ b) with the columns of W over the ranks: every rank computes a term of the sum, the first one's has
    the bias."""

    def __init__(self, ctx: BuildContext, columns: int, rows: Mapping[str, int], *, axis: str, bias: bool) -> None:
        cut, once = Shard(axis, 1), Partial(axis)
        super().__init__(ctx, columns, rows, bias=bias, weight_share=cut, bias_share=once, shared_by={})
        self.boundary = Boundary(takes=Shard(axis, -1), gives=Partial(axis))
