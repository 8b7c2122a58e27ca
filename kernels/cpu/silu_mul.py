"""silu_mul: launcher of `silu_mul` in elementwise.h."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect
from tokenspeed.kernels.registry import Kernel, Target, Traits


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    dtype = target.dtype
    launch = kernels.silu_mul

    def silu_mul(gate_up: Tensor, /) -> Tensor:
        tokens, width = gate_up.shape
        expect("gate_up", gate_up, dtype, (tokens, width))
        if width % 2:
            raise ValueError(f"gate_up has an odd width, {width}")
        out = torch.empty((tokens, width // 2), dtype=dtype)
        launch(gate_up.data_ptr(), gate_up.stride(0), out.data_ptr(), tokens, width // 2, torch.get_num_threads())
        return out

    return silu_mul
