"""moe_experts: launcher of moe.cc.

Pairs of a token and an expert are sorted by expert. Each expert's weights are read once for its tokens, as `linear`
reads them for as many: the bits of a token's result depend on whether each of its experts has up to `LINEAR_FEW`
tokens or more, else neither on the tokens beside it nor on the number of threads. Its experts are summed in the order
of their numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.registry import Kernel, Target, Traits


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    experts, hidden, inner = (int(traits[name]) for name in ("num_experts", "hidden_size", "intermediate_size"))
    dtype = target.dtype
    launch = _ops.MoeExperts(kernels, experts, hidden, inner).run

    def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, /) -> Tensor:
        tokens, slots = ids.shape
        expect("x", x, dtype, (tokens, hidden))
        expect_contiguous("gate_up", gate_up, dtype, (experts, 2 * inner, hidden))
        expect_contiguous("down", down, dtype, (experts, hidden, inner))
        expect_contiguous("ids", ids, torch.int32, (tokens, slots))
        expect_contiguous("weights", weights, torch.float32, (tokens, slots))
        out = torch.empty((tokens, hidden), dtype=dtype)
        launch(
            x.data_ptr(),
            x.stride(0),
            gate_up.data_ptr(),
            down.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            tokens,
            slots,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    return moe_experts
