"""rms_norm: launcher of `rms_norm` in elementwise.h."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.registry import Kernel, Target, Traits


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    dtype = target.dtype
    launch = kernels.rms_norm

    def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, /) -> tuple[Tensor, Tensor]:
        tokens, hidden = x.shape
        expect("x", x, dtype, (tokens, hidden))
        expect_contiguous("weight", weight, dtype, (hidden,))
        y = torch.empty((tokens, hidden), dtype=dtype)
        threads = torch.get_num_threads()
        if residual is None:
            launch(x.data_ptr(), x.stride(0), 0, 0, weight.data_ptr(), y.data_ptr(), 0, tokens, hidden, eps, threads)
            return y, x
        expect("residual", residual, dtype, (tokens, hidden))
        residual_out = torch.empty_like(y)
        launch(
            x.data_ptr(),
            x.stride(0),
            residual.data_ptr(),
            residual.stride(0),
            weight.data_ptr(),
            y.data_ptr(),
            residual_out.data_ptr(),
            tokens,
            hidden,
            eps,
            threads,
        )
        return y, residual_out

    return rms_norm
