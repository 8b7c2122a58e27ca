"""linear: y = x · weightᵀ + bias for up to 16 tokens, at the rate at which memory gives the weights.

A program owns a few whole rows of the weight. What it can hold of them in registers it requests before it
waits for the kernel before, so that memory is busy while that one ends. Very few tokens: plain vector
products. More: tensor-core products x · weightᵀ, K cut among the warps (a batch of products, summed at the
end), since 16 rows of weights would occupy two warps only. From 17 tokens on it is torch's product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.launch import (
    dependency_wait,
    dependent_launch,
    is_hopper,
    release_dependents,
    shared_memory,
)

MAX_TOKENS = 16


@triton.jit
def _vector_products(
    x, weight, bias, y, num_rows, x_stride, weight_stride,
    TOKENS: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr,
    HAS_BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    release_dependents(DEPENDENT)
    source = weight + row.to(tl.int64)[:, None] * weight_stride + k[None, :]
    exists = (row < num_rows)[:, None]
    held = ()
    for start in tl.static_range(0, HELD, BLOCK_K):
        held = held + (tl.load(source + start, mask=exists & (start + k < K)[None, :], other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    dependency_wait(DEPENDENT)
    totals = ()
    for token in tl.static_range(TOKENS):
        total = tl.zeros([ROWS], tl.float32)
        for start in tl.static_range(0, HELD, BLOCK_K):
            value = tl.load(x + token * x_stride + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            total += tl.sum(held[start // BLOCK_K].to(tl.float32) * value[None, :], 1)
        totals = totals + (total,)  # type: ignore[assignment]  # noqa: RUF005
    for start in tl.static_range(HELD, K, BLOCK_K):
        tile = tl.load(source + start, mask=exists & (start + k < K)[None, :], other=0.0).to(tl.float32)
        more = ()
        for token in tl.static_range(TOKENS):
            value = tl.load(x + token * x_stride + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            more = more + (totals[token] + tl.sum(tile * value[None, :], 1),)  # type: ignore[assignment]  # noqa: RUF005
        totals = more
    for token in tl.static_range(TOKENS):
        total = totals[token]
        if HAS_BIAS:
            total += tl.load(bias + row, mask=row < num_rows, other=0.0).to(tl.float32)
        tl.store(y + token * num_rows + row, total.to(y.dtype.element_ty), mask=row < num_rows)


@triton.jit
def _tile_of_x(x, x_stride, tokens, t, at, K: tl.constexpr):
    """[parts, 16, BLOCK_K] of x, K being cut at `at` [parts, BLOCK_K]."""
    inside = (t < tokens)[None, :, None] & (at < K)[:, None, :]
    return tl.load(x + t[None, :, None] * x_stride + at[:, None, :], mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def _tensor_products(
    x, weight, bias, y, second, second_y, tokens, num_rows, second_rows, x_stride, weight_stride, second_stride,
    K: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr,
    STAGES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SECOND: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    STEP: tl.constexpr = PARTS * BLOCK_K
    first_row = tl.program_id(0) * ROWS
    biased = HAS_BIAS
    if HAS_SECOND:
        # The programs behind those of `weight` take the rows of a second one.
        behind = first_row - (num_rows + ROWS - 1) // ROWS * ROWS
        if behind >= 0:
            weight, y, num_rows, weight_stride = second, second_y, second_rows, second_stride
            first_row = behind
            biased = False
    row = first_row + tl.arange(0, ROWS)
    t = tl.arange(0, 16)
    at = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    release_dependents(DEPENDENT)
    source = weight + row.to(tl.int64)[None, :, None] * weight_stride + at[:, None, :]
    exists = (row < num_rows)[None, :, None]
    held = ()
    for start in tl.static_range(0, HELD, STEP):
        held = held + (tl.load(source + start, mask=exists & (start + at < K)[:, None, :], other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    dependency_wait(DEPENDENT)
    acc = tl.zeros([PARTS, 16, ROWS], tl.float32)
    for start in tl.static_range(0, HELD, STEP):
        value = _tile_of_x(x, x_stride, tokens, t, start + at, K)
        acc = tl.dot(value, tl.trans(held[start // STEP], (0, 2, 1)), acc)
    for start in tl.range(HELD, K, STEP, num_stages=STAGES):
        value = _tile_of_x(x, x_stride, tokens, t, start + at, K)
        tile = tl.load(source + start, mask=exists & (start + at < K)[:, None, :], other=0.0)
        acc = tl.dot(value, tl.trans(tile, (0, 2, 1)), acc)
    total = tl.sum(acc, 0)
    if HAS_BIAS:
        total += tl.load(bias + row, mask=(row < num_rows) & biased, other=0.0).to(tl.float32)[None, :]
    inside = (t < tokens)[:, None] & (row < num_rows)[None, :]
    tl.store(y + t[:, None] * num_rows + row[None, :], total.to(y.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class VectorConfig:
    """`rows` of the weight a program, `block_k` elements of K a load, up to `held` of K requested before the wait."""

    rows: int = 4
    block_k: int = 2048
    held: int = 2048
    warps: int = 4


@dataclass(frozen=True)
class TensorConfig:
    """`rows` of the weight a program; K in steps of parts × `block_k`, up to `held` of it requested before the wait."""

    rows: int = 16
    parts: int = 4
    block_k: int = 128
    held: int = 2048
    stages: int = 3


class Linear:
    """The op; see `ops.Linear`. A configuration given here is used for every shape and number of tokens.

    With `out_dtype` the results are of that type instead of x's, rounded once if at all.
    """

    def __init__(self, config: VectorConfig | TensorConfig | None = None, out_dtype: torch.dtype | None = None) -> None:
        self.config = config
        self.out_dtype = out_dtype

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> Tensor:
        (tokens, k), num_rows = x.shape, weight.shape[0]
        config = self.config or choose(tokens, k, num_rows, x.dtype) if 0 < tokens <= MAX_TOKENS else None
        if config is None:
            return self._by_torch(x, weight, bias)
        y = torch.empty(tokens, num_rows, dtype=self.out_dtype or x.dtype, device=x.device)
        if isinstance(config, VectorConfig):
            self._vector(config, x, weight, bias, y)
        else:
            self._tensor(config, x, weight, bias, y)
        return y

    def pair(self, x: Tensor, weight: Tensor, bias: Tensor | None, second: Tensor) -> tuple[Tensor, Tensor]:
        """(x · weightᵀ + bias, x · secondᵀ), in one launch where both take the same configuration."""
        (tokens, k), num_rows = x.shape, weight.shape[0] + second.shape[0]
        config = self.config or choose(tokens, k, num_rows, x.dtype) if 0 < tokens <= MAX_TOKENS else None
        if not isinstance(config, TensorConfig):
            return self(x, weight, bias), self(x, second, None)
        y, second_y = (torch.empty(tokens, each.shape[0], dtype=x.dtype, device=x.device) for each in (weight, second))
        self._tensor(config, x, weight, bias, y, second, second_y)
        return y, second_y

    def _by_torch(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.out_dtype in (None, x.dtype):
            return functional.linear(x, weight, bias)
        if not x.is_cuda:  # torch's CPU products round to the type of x
            y = functional.linear(x.to(self.out_dtype), weight.to(self.out_dtype))
        else:
            y = torch.mm(x, weight.t(), out_dtype=self.out_dtype)
        return y if bias is None else y + bias

    def _vector(self, config: VectorConfig, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
        (tokens, k), num_rows = x.shape, weight.shape[0]
        block_k = min(config.block_k, triton.next_power_of_2(k))
        dependent = is_hopper(x.device)
        _vector_products[triton.cdiv(num_rows, config.rows),](
            x, weight, bias, y, num_rows, x.stride(0), weight.stride(0),
            TOKENS=tokens, K=k, ROWS=config.rows, BLOCK_K=block_k, HELD=_whole(min(k, config.held), block_k),
            HAS_BIAS=bias is not None, DEPENDENT=dependent, num_warps=config.warps, **dependent_launch(dependent),
        )  # fmt: skip

    def _tensor(
        self, config: TensorConfig, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor,
        second: Tensor | None = None, second_y: Tensor | None = None,
    ) -> None:  # fmt: skip
        (tokens, k), num_rows = x.shape, weight.shape[0]
        second_rows, second_stride = (0, 0) if second is None else (second.shape[0], second.stride(0))
        dependent = is_hopper(x.device)
        step_bytes = config.parts * config.block_k * (config.rows + 16) * x.element_size()
        stages = min(config.stages, 1 + shared_memory(x.device) // step_bytes)
        _tensor_products[triton.cdiv(num_rows, config.rows) + triton.cdiv(second_rows, config.rows),](
            x, weight, bias, y, second, second_y, tokens, num_rows, second_rows,
            x.stride(0), weight.stride(0), second_stride,
            K=k, ROWS=config.rows, PARTS=config.parts, BLOCK_K=config.block_k,
            HELD=_whole(min(k, config.held), config.parts * config.block_k), STAGES=stages,
            HAS_BIAS=bias is not None, HAS_SECOND=second is not None, DEPENDENT=dependent,
            num_warps=config.parts, **dependent_launch(dependent),
        )  # fmt: skip


def _whole(size: int, step: int) -> int:
    return -(-size // step) * step


def choose(tokens: int, k: int, num_rows: int, dtype: torch.dtype) -> VectorConfig | TensorConfig | None:
    """The configuration for a shape, as measured on an H100; None is torch's product."""
    if tokens == 1:
        return VectorConfig(warps=8) if k > 2048 else VectorConfig(rows=2 if num_rows <= 2048 else 4)
    if dtype is torch.float32:
        return VectorConfig() if tokens <= 4 else None  # tensor cores would round to tf32
    if tokens == 2 and (k <= 2048 or num_rows > 4096):
        return VectorConfig(rows=4 if k <= 2048 else 2)
    if num_rows <= 4096:  # 16 rows a program: all programs run at once, each with most of its weights on the way
        return TensorConfig()
    if num_rows <= 8192:
        return TensorConfig(block_k=64, held=1024, stages=4)
    return TensorConfig(rows=32, block_k=64, held=0, stages=5)  # x is read half as often


def bind(target: Target, traits: Traits) -> Kernel:
    return Linear()
