"""rms_norm: r = x + residual; y = r / sqrt(mean(r²) + eps) · weight."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Implementation, plain


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
    residual_out = x if residual is None else x + residual
    r = residual_out.to(torch.promote_types(x.dtype, torch.float32))
    y = r * torch.rsqrt(r.square().mean(dim=-1, keepdim=True) + eps) * weight
    return y.to(x.dtype), residual_out


IMPLEMENTATION = Implementation("rms_norm", "reference", plain(rms_norm))
