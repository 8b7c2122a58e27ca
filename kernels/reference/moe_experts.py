"""moe_experts: y = Σ w · down_e · (silu(gate_e · x) · (up_e · x)) over the experts e of each token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from tokenspeed.kernels.registry import Implementation, plain


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, /) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in range(gate_up.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        gate, up = (x[token].to(wide) @ gate_up[expert].to(wide).T).chunk(2, dim=-1)
        hidden = (silu(gate) * up).to(x.dtype).to(wide)
        out.index_add_(0, token, hidden @ down[expert].to(wide).T * weights[token, slot].to(wide).unsqueeze(1))
    return out.to(x.dtype)


IMPLEMENTATION = Implementation("moe_experts", "reference", plain(moe_experts))
