"""silu_mul: gate · sigmoid(gate) · up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents


@triton.jit
def _silu_mul(gate_up, out, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    gate = tl.load(gate_up + token * stride + i, mask=i < SIZE, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * stride + SIZE + i, mask=i < SIZE, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * SIZE + i, value.to(out.dtype.element_ty), mask=i < SIZE)


def silu_mul(gate_up: Tensor, /) -> Tensor:
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, size, dtype=gate_up.dtype, device=gate_up.device)
    if tokens:
        block = min(triton.next_power_of_2(size), 512 if tokens <= 32 else 2048)
        dependent = is_hopper(gate_up.device)
        _silu_mul[tokens, triton.cdiv(size, block)](
            gate_up, out, gate_up.stride(0), SIZE=size, BLOCK=block, DEPENDENT=dependent,
            num_warps=max(1, min(8, block // 256)), **dependent_launch(dependent),
        )  # fmt: skip
    return out


def bind(target: Target, traits: Traits) -> Kernel:
    return silu_mul
