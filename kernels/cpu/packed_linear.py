"""packed_linear: launcher of panels.h and pairs.h."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect
from tokenspeed.kernels.cpu.blocks import described
from tokenspeed.kernels.forms import Packed
from tokenspeed.kernels.registry import Kernel, Target, Traits


def product(kernels: _ops.Kernels, target: Target, form: str, out_dtype: torch.dtype) -> Kernel:
    """x [T,K], a packed weight [N,K], bias → [T,N] of `out_dtype`, which is float32 or the target's."""
    dtype, launch = target.dtype, kernels.linear
    float_out = out_dtype is torch.float32

    def packed_linear(x: Tensor, weight: Packed, bias: Tensor | None = None, /) -> Tensor:
        data, at, rows, columns, _, _ = described("weight", weight, bias, form, dtype)
        tokens = x.shape[0]
        expect("x", x, dtype, (tokens, columns))
        out = torch.empty((tokens, rows), dtype=out_dtype)
        threads = torch.get_num_threads()
        launch(
            x.data_ptr(), x.stride(0), data, 0, at, out.data_ptr(), float_out, tokens, columns, rows, form, threads
        )  # fmt: skip
        return out

    return packed_linear


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    return product(kernels, target, str(traits["matrix_form"]), target.dtype)
