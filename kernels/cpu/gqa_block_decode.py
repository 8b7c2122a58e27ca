"""gqa_block_decode: launcher of `gqa_block` in blocks.cc, the whole block in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.block_weights import CacheRows, Edge, GqaWeights
from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect_contiguous
from tokenspeed.kernels.cpu.blocks import Entrance, described, located
from tokenspeed.kernels.registry import Kernel, Target, Traits

Fixed = tuple[GqaWeights, float, Tensor, Tensor, float]


class GqaBlockDecode:
    """The block of one layer: what does not change from step to step is prepared at the first call with it."""

    def __init__(self, kernels: _ops.Kernels, target: Target, traits: Traits) -> None:
        self._kernels, self._dtype, self._traits = kernels, target.dtype, traits
        self._hidden = int(traits["hidden_size"])
        self._forms = str(traits["qkv_form"]), str(traits["out_form"])
        self._entrance = Entrance(target.dtype)
        self._fixed: Fixed | None = None
        self._block: _ops.GqaBlock

    def __call__(
        self, x: Tensor, edge: Edge | None, weights: GqaWeights, eps: float, k_cache: Tensor, v_cache: Tensor,
        rows: CacheRows, scale: float, /,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        fixed = self._fixed
        if (
            fixed is None or weights is not fixed[0] or k_cache is not fixed[2] or v_cache is not fixed[3]
            or eps != fixed[1] or scale != fixed[4]
        ):  # fmt: skip
            self._block = described_gqa(
                self._kernels, self._dtype, self._traits, self._forms, weights, eps, k_cache, v_cache, scale
            )
            self._fixed = weights, eps, k_cache, v_cache, scale
        place, num_rows = located(rows)
        shape = num_rows, self._hidden
        y = torch.empty(shape, dtype=self._dtype)
        arguments, total = self._entrance.arguments(x, edge, shape, y)
        self._block.run(place, *arguments)
        return y, total


def described_gqa(
    kernels: _ops.Kernels, dtype: torch.dtype, traits: Traits, forms: tuple[str, str], weights: GqaWeights, eps: float,
    k_cache: Tensor, v_cache: Tensor, scale: float,
) -> _ops.GqaBlock:  # fmt: skip
    """The block of these weights and caches, whose qkv and out are of `forms`. Raises `ValueError` for what does not
    fit."""
    heads, kv_heads, size, block_size, hidden = (
        int(traits[name]) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size", "hidden_size")
    )
    qkv = described("qkv", weights.qkv, weights.qkv_bias, forms[0], dtype)
    out = described("out", weights.out, weights.out_bias, forms[1], dtype)
    if qkv[2:4] != ((heads + 2 * kv_heads) * size, hidden) or out[2:4] != (hidden, heads * size):
        raise ValueError(f"qkv is {qkv[2:4]} and out {out[2:4]}: not of {heads}/{kv_heads} heads of {size}")
    for name, gain in (("q_gain", weights.q_gain), ("k_gain", weights.k_gain)):
        if gain is not None:
            expect_contiguous(name, gain, dtype, (size,))
    num_blocks = k_cache.shape[0]
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        expect_contiguous(name, cache, dtype, (num_blocks, block_size, kv_heads, size))
    num_positions = weights.cos_sin.shape[0]
    expect_contiguous("cos_sin", weights.cos_sin, torch.float32, (num_positions, size))
    q_gain, k_gain = (0 if gain is None else gain.data_ptr() for gain in (weights.q_gain, weights.k_gain))
    return _ops.GqaBlock(
        kernels, qkv, out, q_gain, k_gain, eps, weights.cos_sin.data_ptr(), num_positions, bool(traits["interleaved"]),
        k_cache.data_ptr(), v_cache.data_ptr(), num_blocks, block_size, heads, kv_heads, size, scale,
    )  # fmt: skip


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    return GqaBlockDecode(kernels, target, traits)
