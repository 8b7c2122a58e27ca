"""quantise: one program some blocks of one token.

The bits of an e4m3 number are made by integer arithmetic, so that chips without the type (before sm89, AMD's
other format) write the same ones; rounding is to the nearest, of equals to the even one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.reference.quantise import LARGEST
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents

PROGRAM = 1024
"""About so many elements a program."""


@triton.jit
def _rounded(x):
    """The nearest integer of |x| < 2^22, of equals the even one: adding 1.5 · 2^23 leaves no bits behind the point."""
    return (x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _e4m3(x):
    """The bits of the e4m3 number nearest to x, |x| ≤ 448."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # 20 of 23 mantissa bits go; the exponent's bias changes from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the numbers are whole multiples of 2^-9.
    small = _rounded(tl.abs(x) * 512.0)
    return tl.where(tl.abs(x) < 0.015625, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _quantise(
    x, values, scales, x_stride, num_blocks,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LARGEST: tl.constexpr, FP8: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    numbers = tl.load(x + token * x_stride + at, mask=at < SIZE, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(numbers), 1), tl.full([BLOCKS], LARGEST, tl.float32))
    tl.store(scales + token * num_blocks + block, scale, mask=block < num_blocks)
    divisor = tl.where(scale > 0, scale, 1.0)
    numbers = tl.div_rn(numbers, tl.broadcast_to(divisor[:, None], [BLOCKS, BLOCK]))
    numbers = tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST)
    number = _e4m3(numbers) if FP8 else _rounded(numbers)
    tl.store(values + token * SIZE + at, number.to(values.dtype.element_ty), mask=at < SIZE)


def bind(target: Target, traits: Traits) -> Kernel:
    block, form = int(traits["block"]), str(traits["form"])
    fp8 = form == "fp8"

    def quantise(x: Tensor, /) -> tuple[Tensor, Tensor]:
        tokens, size = x.shape
        num_blocks = triton.cdiv(size, block)
        values = torch.empty(tokens, size, dtype=torch.uint8 if fp8 else torch.int8, device=x.device)
        scales = torch.empty(tokens, num_blocks, dtype=torch.float32, device=x.device)
        if tokens:
            together = max(1, min(PROGRAM // block, triton.next_power_of_2(num_blocks)))
            dependent = is_hopper(x.device)
            _quantise[tokens, triton.cdiv(num_blocks, together)](
                x, values, scales, x.stride(0), num_blocks,
                SIZE=size, BLOCK=block, BLOCKS=together, LARGEST=LARGEST[form], FP8=fp8, DEPENDENT=dependent,
                num_warps=4, **dependent_launch(dependent),
            )  # fmt: skip
        return values.view(torch.float8_e4m3fn) if fp8 else values, scales

    return quantise
