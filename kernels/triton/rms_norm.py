"""rms_norm: r = x + residual; y = r / sqrt(mean(r²) + eps) · weight. One program a token, the token in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents


@triton.jit
def _norm(
    x, residual, weight, y, residual_out, eps, x_stride, residual_stride,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    inside = h < HIDDEN
    release_dependents(DEPENDENT)
    gain = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    dependency_wait(DEPENDENT)
    r = tl.load(x + token * x_stride + h, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        other = tl.load(residual + token * residual_stride + h, mask=inside, other=0.0)
        r = (r.to(tl.float32) + other.to(tl.float32)).to(r.dtype)
        tl.store(residual_out + token * HIDDEN + h, r, mask=inside)
    # The sum as it is stored, not as it was before rounding: what the next layer adds to is what was normed.
    wide = r.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN + eps)
    tl.store(y + token * HIDDEN + h, (wide * scale * gain).to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
    tokens, hidden = x.shape
    y = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    residual_out = x if residual is None else torch.empty_like(y)
    if tokens:
        block = triton.next_power_of_2(hidden)
        other, stride = (x, 0) if residual is None else (residual, residual.stride(0))
        dependent = is_hopper(x.device)
        _norm[tokens,](
            x, other, weight, y, residual_out, eps, x.stride(0), stride,
            HIDDEN=hidden, BLOCK=block, HAS_RESIDUAL=residual is not None, DEPENDENT=dependent,
            num_warps=max(1, min(16, block // 512)), **dependent_launch(dependent),
        )  # fmt: skip
    return y, residual_out


def bind(target: Target, traits: Traits) -> Kernel:
    return rms_norm
