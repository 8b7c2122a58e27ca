"""lm_head: logits = x · weightᵀ, in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.registry import Implementation, plain


def lm_head(x: Tensor, weight: Tensor, /) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return functional.linear(x.to(wide), weight.to(wide))


IMPLEMENTATION = Implementation("lm_head", "reference", plain(lm_head))
