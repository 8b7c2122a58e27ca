"""lm_head: the product of `linear` with float32 results."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.linear import Linear


def bind(target: Target, traits: Traits) -> Kernel:
    product = Linear(out_dtype=torch.float32)

    def lm_head(x: Tensor, weight: Tensor, /) -> Tensor:
        return product(x, weight)

    return lm_head
