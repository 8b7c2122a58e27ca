"""What a block of one token begins with: residual sum and norm in the prologue of the products that take them.

Every program norms the whole token again: 4 KB from the L2 cache are cheaper than the boundary of a launch (about
1 µs). The norm's scale is a factor of the products' sums, so that both reductions run at once; the gain is folded
into x, which is not rounded in between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.block_weights import Edge
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents


@triton.jit
def stream(x, residual, residual_out, at, inside, first, HAS_RESIDUAL: tl.constexpr):
    """x + residual as float32 of a rounded sum, which the programs with `first` store: what the next layer adds to
    is what was normed."""
    r = tl.load(x + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        r = (r.to(tl.float32) + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)).to(r.dtype)
        tl.store(residual_out + at, r, mask=inside & first)
    return r.to(tl.float32)


@triton.jit
def _norm_products(
    x, residual, gain, first, first_bias, second, y, second_y, residual_out, eps,
    first_rows, second_rows, first_stride, second_stride,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SECOND: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    release_dependents(DEPENDENT)
    program = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    row = program * ROWS + tl.arange(0, ROWS)
    mine = row < first_rows
    source = first + row.to(tl.int64)[:, None] * first_stride + k[None, :]
    to = y + row
    if HAS_SECOND:
        other = row - (first_rows + ROWS - 1) // ROWS * ROWS
        in_second = other >= 0
        mine = mine | (in_second & (other < second_rows))
        source = tl.where(
            in_second[:, None], second + other.to(tl.int64)[:, None] * second_stride + k[None, :], source
        )  # fmt: skip
        to = tl.where(in_second, second_y + other, to)
    weight = tl.load(source, mask=mine[:, None] & inside[None, :], other=0.0)
    if HAS_NORM:
        gains = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    dependency_wait(DEPENDENT)
    value = stream(x, residual, residual_out, k, inside, program == 0, HAS_RESIDUAL)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(value * value, 0) / K + eps)
        total = tl.sum(weight.to(tl.float32) * (value * gains)[None, :], 1) * scale
    else:
        total = tl.sum(weight.to(tl.float32) * value[None, :], 1)
    if HAS_BIAS:
        total += tl.load(first_bias + row, mask=row < first_rows, other=0.0).to(tl.float32)
    tl.store(to, total.to(y.dtype.element_ty), mask=mine)


def norm_products(
    x: Tensor, edge: Edge | None, weight: Tensor, bias: Tensor | None = None, second: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [1,H], weight [N,H] with bias [N] or None, second [M,H] or None → (norm · weightᵀ + bias [1,N], norm · secondᵀ
    [1,M] or None, x + residual or None). Without an edge x is normed already."""
    k, device = x.shape[1], x.device
    residual = None if edge is None else edge.residual
    rows, second_rows = weight.shape[0], 0 if second is None else second.shape[0]
    y = torch.empty(1, rows, dtype=x.dtype, device=device)
    second_y = None if second is None else torch.empty(1, second_rows, dtype=x.dtype, device=device)
    residual_out = x if residual is None else torch.empty(1, k, dtype=x.dtype, device=device)
    block_k = triton.next_power_of_2(k)
    per_program = max(1, min(4, 8192 // block_k))
    dependent = is_hopper(device)
    _norm_products[triton.cdiv(rows, per_program) + triton.cdiv(second_rows, per_program),](
        x, x if residual is None else residual, x if edge is None else edge.gain, weight, bias, second, y, second_y,
        residual_out, 0.0 if edge is None else edge.eps,
        rows, second_rows, weight.stride(0), 0 if second is None else second.stride(0),
        K=k, BLOCK_K=block_k, ROWS=per_program, HAS_NORM=edge is not None, HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None, HAS_SECOND=second is not None, DEPENDENT=dependent,
        num_warps=4 if block_k <= 2048 else 8, **dependent_launch(dependent),
    )  # fmt: skip
    return y, second_y, None if edge is None else residual_out


@triton.jit
def _norm_scores(
    x, residual, gain, weight, scores, y, residual_out, eps, num_rows,
    K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    release_dependents(DEPENDENT)
    token = tl.program_id(1)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mine = row < num_rows
    tile = tl.load(weight + row[:, None] * K + k[None, :], mask=mine[:, None] & inside[None, :], other=0.0)
    if HAS_NORM:
        gains = tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)
    dependency_wait(DEPENDENT)
    first = tl.program_id(0) == 0
    value = stream(x, residual, residual_out, token * K + k, inside, first, HAS_RESIDUAL)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(value * value, 0) / K + eps)
        normed = (value * scale * gains).to(y.dtype.element_ty)
        tl.store(y + token * K + k, normed, mask=inside & first)
        value = normed.to(tl.float32)
    total = tl.sum(tile * value[None, :], 1)
    tl.store(scores + token * num_rows + row, total, mask=mine)


def norm_scores(x: Tensor, edge: Edge | None, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """x [T,H] contiguous, weight [E,H] float32 → (norm · weightᵀ [T,E] float32, norm [T,H], x + residual or None).

    For few tokens: every token reads the whole weight, from the L2 cache.
    """
    (tokens, k), num_rows, device = x.shape, weight.shape[0], x.device
    residual = None if edge is None else edge.residual
    scores = torch.empty(tokens, num_rows, dtype=torch.float32, device=device)
    y = x if edge is None else torch.empty_like(x)
    residual_out = x if residual is None else torch.empty_like(x)
    block_k = triton.next_power_of_2(k)
    # One token: as many programs as may be. More: a program's norm serves several rows.
    per_program = 1 if tokens == 1 else max(1, min(4, 8192 // block_k))
    dependent = is_hopper(device)
    _norm_scores[triton.cdiv(num_rows, per_program), tokens](
        x, x if residual is None else residual, x if edge is None else edge.gain, weight, scores, y, residual_out,
        0.0 if edge is None else edge.eps, num_rows,
        K=k, BLOCK_K=block_k, ROWS=per_program, HAS_NORM=edge is not None, HAS_RESIDUAL=residual is not None,
        DEPENDENT=dependent, num_warps=4 if block_k <= 2048 else 8, **dependent_launch(dependent),
    )  # fmt: skip
    return scores, y, None if edge is None else residual_out
