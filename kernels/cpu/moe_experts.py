"""moe_experts: launcher of moe.cc.

Pairs of a token and an expert are sorted by expert. Each expert's weights are read once for its tokens, as `linear`
reads them for as many: the bits of a token's result depend on whether each of its experts has up to `LINEAR_FEW`
tokens or more, else neither on the tokens beside it nor on the number of threads. Its experts are summed in the order
of their numbers.

Where torch has faster products of bfloat16 (FEATURES), calls of more than `LINEAR_FEW` tokens and more than FEW of
them an expert are left to it: DeepSeek-V2-Lite's layer at 512 tokens takes 0.40 s of a core with tiles instead of 0.89,
at 64 both take 0.15. The vectors of `avx512_bf16` need no torch: of a Zen 4 core 64 tokens take 79 ms instead of 131,
512 take 0.40 s instead of 0.43.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.cpu import _ops, silu_mul
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.registry import Kernel, Target, Traits

FEATURES = frozenset({"amx_bf16", "bf16"})
"""Any of them makes torch's product of bfloat16 faster than the ones here."""

FEW = 8
"""Tokens an expert, in the mean, up to which torch is not faster."""


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    experts, hidden, inner = (int(traits[name]) for name in ("num_experts", "hidden_size", "intermediate_size"))
    dtype = target.dtype
    launch = _ops.MoeExperts(kernels, experts, hidden, inner).run
    activate = silu_mul.bind(kernels, target, traits)
    torch_has_more = dtype is torch.bfloat16 and not target.platform.isa.isdisjoint(FEATURES)

    def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, /) -> Tensor:
        tokens, slots = ids.shape
        expect("x", x, dtype, (tokens, hidden))
        expect_contiguous("gate_up", gate_up, dtype, (experts, 2 * inner, hidden))
        expect_contiguous("down", down, dtype, (experts, hidden, inner))
        expect_contiguous("ids", ids, torch.int32, (tokens, slots))
        expect_contiguous("weights", weights, torch.float32, (tokens, slots))
        if torch_has_more and tokens > _ops.LINEAR_FEW and int((ids >= 0).sum()) > FEW * experts:
            return by_torch(x, gate_up, down, ids, weights)
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

    def by_torch(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        wrong = ((ids < -1) | (ids >= experts)).any(dim=1).nonzero()
        if wrong.numel():
            raise IndexError(f"moe_experts: an expert of token {int(wrong[0])} is not among the {experts}")
        out = torch.zeros(x.shape)
        for expert in range(experts):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            if token.numel():
                y = functional.linear(activate(functional.linear(x[token], gate_up[expert])), down[expert])
                out.index_add_(0, token, y.float() * weights[token, slot].unsqueeze(1))
        return out.to(dtype)

    return moe_experts
