"""linear: launcher of linear_few.h and linear_many.h.

Up to LINEAR_FEW tokens, and above, the bits of a token's result do not depend on the tokens beside it, nor on
the number of threads; between the two the order of the sums differs. Where the processor multiplies bfloat16,
more tokens than that are left to torch, which has tile instructions where there are any.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.registry import Kernel, Target, Traits

BFLOAT16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Any of them makes torch's own bfloat16 product fast; without, it is 6 times slower than float32's."""


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    launch, dtype = kernels.linear, target.dtype
    torch_has_more = dtype is torch.bfloat16 and not target.platform.isa.isdisjoint(BFLOAT16_FEATURES)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> Tensor:
        tokens, columns = x.shape
        rows = weight.shape[0]
        expect("x", x, dtype, (tokens, columns))
        expect("weight", weight, dtype, (rows, columns))
        if bias is not None:
            expect_contiguous("bias", bias, dtype, (rows,))
        if torch_has_more and tokens > _ops.LINEAR_FEW:
            return functional.linear(x, weight, bias)
        out = torch.empty((tokens, rows), dtype=dtype)
        launch(
            x.data_ptr(),
            x.stride(0),
            weight.data_ptr(),
            weight.stride(0),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            False,
            tokens,
            columns,
            rows,
            "rows",
            torch.get_num_threads(),
        )
        return out

    return linear
