"""Products with packed weights, and rows of packed tables: unpacked, then as with plain ones, in float32 at least."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.forms import Packed, unpack
from tokenspeed.kernels.registry import Implementation, Kernel, Target, Traits, plain


def packed_lm_head(x: Tensor, weight: Packed, /) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return functional.linear(x.to(wide), unpack(weight, wide))


def packed_linear(x: Tensor, weight: Packed, bias: Tensor | None = None, /) -> Tensor:
    product = packed_lm_head(x, weight)
    return (product if bias is None else product + bias).to(x.dtype)


def bind_embedding(target: Target, traits: Traits) -> Kernel:
    wide = torch.promote_types(target.dtype, torch.float32)

    def packed_embedding(ids: Tensor, table: Packed, /) -> Tensor:
        return functional.embedding(ids, unpack(table, wide)).to(target.dtype)

    return packed_embedding


IMPLEMENTATIONS = (
    Implementation("packed_embedding", "reference", bind_embedding),
    Implementation("packed_linear", "reference", plain(packed_linear)),
    Implementation("packed_lm_head", "reference", plain(packed_lm_head)),
)
