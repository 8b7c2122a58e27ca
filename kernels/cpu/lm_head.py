"""lm_head: launcher of linear_few.h and linear_many.h with float32 results."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect
from tokenspeed.kernels.registry import Kernel, Target, Traits


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    launch, dtype = kernels.linear, target.dtype

    def lm_head(x: Tensor, weight: Tensor, /) -> Tensor:
        tokens, columns = x.shape
        rows = weight.shape[0]
        expect("x", x, dtype, (tokens, columns))
        expect("weight", weight, dtype, (rows, columns))
        out = torch.empty((tokens, rows), dtype=torch.float32)
        launch(
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            weight.stride(0),
            0,
            out.data_ptr(),
            True,
            tokens,
            columns,
            rows,
            "rows",
            torch.get_num_threads(),
        )
        return out

    return lm_head
