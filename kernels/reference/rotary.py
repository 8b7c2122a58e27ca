"""rotary: each pair (a, b) of a head becomes (a·cos − b·sin, b·cos + a·sin), in place."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Implementation, Kernel, Target, Traits


def bind(target: Target, traits: Traits) -> Kernel:
    interleaved = bool(traits["interleaved"])

    def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, /) -> tuple[Tensor, Tensor]:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
        for x in (q, k):
            _rotate(x, cos, sin, interleaved)
        return q, k

    return rotary


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    a, b = (part.to(torch.promote_types(x.dtype, torch.float32)) for part in (first, second))
    # Both halves are computed before either is stored: in float32 a and b are views of x.
    turned = a * cos - b * sin, b * cos + a * sin
    first.copy_(turned[0])
    second.copy_(turned[1])


IMPLEMENTATION = Implementation("rotary", "reference", bind)
