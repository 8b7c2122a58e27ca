"""quantise: blocks of a token's elements as 8-bit numbers with one scale each, the largest at the format's end."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.registry import Implementation, Kernel, Target, Traits

LARGEST = {"fp8": 448.0, "int8": 127.0}


def bind(target: Target, traits: Traits) -> Kernel:
    block, form = int(traits["block"]), str(traits["form"])
    largest = LARGEST[form]

    def quantise(x: Tensor, /) -> tuple[Tensor, Tensor]:
        tokens, size = x.shape
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        blocks = functional.pad(wide, (0, -size % block)).view(tokens, -1, block)
        peaks = blocks.abs().amax(2)
        # By a tensor: on a GPU, torch divides by a plain number as a product with its inverse, one bit off.
        scales = (peaks / torch.full_like(peaks, largest)).float()
        divisors = torch.where(scales > 0, scales, 1).unsqueeze(2)
        numbers = (blocks / divisors).clamp(-largest, largest).flatten(1)[:, :size]
        if form == "fp8":
            return numbers.to(torch.float8_e4m3fn), scales
        return numbers.round().to(torch.int8), scales

    return quantise


IMPLEMENTATION = Implementation("quantise", "reference", bind)
