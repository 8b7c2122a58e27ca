"""silu_mul: gate · sigmoid(gate) · up."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Implementation, plain


def silu_mul(gate_up: Tensor, /) -> Tensor:
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


IMPLEMENTATION = Implementation("silu_mul", "reference", plain(silu_mul))
