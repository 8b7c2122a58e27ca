"""mla_decode: softmax(scale · q·Kᵀ)·V in the latent space, where K is the cache and V its latent part."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Implementation, plain


def mla_decode(
    q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float, /
) -> Tensor:
    rows, num_queries, _, rank = q_latent.shape
    block_size = kv_cache.shape[1]
    num_blocks = -(-int(kv_len.max()) // block_size) if rows else 0
    position = torch.arange(num_blocks * block_size, device=kv_len.device)
    absent = position >= kv_len.unsqueeze(1)  # [R,L]
    # Entries past a row's length are undefined: any block that exists stands in for them.
    table = block_table[:, :num_blocks].long().masked_fill(absent[:, ::block_size], 0)
    wide = torch.promote_types(q_latent.dtype, torch.float32)
    kv = kv_cache[table].flatten(1, 2).to(wide).masked_fill(absent.unsqueeze(2), 0)  # [R,L,C+P]
    q = torch.cat((q_latent, q_rope), dim=-1).to(wide)
    visible = kv_len.unsqueeze(1) - num_queries + 1 + torch.arange(num_queries, device=kv_len.device)  # [R,Q]
    hidden = position >= visible.unsqueeze(2)  # [R,Q,L]
    scores = torch.einsum("rqhd,rld->rqhl", q, kv) * scale
    weights = scores.masked_fill(hidden.unsqueeze(2), float("-inf")).softmax(dim=-1)
    # A query that sees nothing has weights of 0/0; it gives zeros.
    weights = weights.masked_fill(hidden.all(dim=2)[:, :, None, None], 0)
    return torch.einsum("rqhl,rlc->rqhc", weights, kv[..., :rank]).to(q_latent.dtype)


IMPLEMENTATION = Implementation("mla_decode", "reference", plain(mla_decode))
