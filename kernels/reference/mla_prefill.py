"""mla_prefill: keys and values expanded from the latent cache, then causal attention, row after row."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Implementation, plain


def mla_prefill(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    k_up: Tensor,
    v_up: Tensor,
    scale: float,
    /,
) -> Tensor:
    num_heads, nope_dim, rank = k_up.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    k_up, v_up = k_up.to(wide), v_up.to(wide)
    out = torch.empty(q.shape[0], num_heads, v_up.shape[1], dtype=q.dtype, device=q.device)
    start = 0
    for row, (n, length) in enumerate(zip(query_lens, kv_lens, strict=True)):
        table = block_table[row, : -(-length // kv_cache.shape[1])].long()
        latent, rope = kv_cache[table].flatten(0, 1)[:length].to(wide).tensor_split((rank,), dim=-1)
        k, v = (torch.einsum("lc,hdc->hld", latent, up) for up in (k_up, v_up))
        q_nope, q_rope = q[start : start + n].to(wide).tensor_split((nope_dim,), dim=-1)
        visible = kv_len[row] - n + 1 + torch.arange(n, device=q.device)
        hidden = torch.arange(length, device=q.device) >= visible.unsqueeze(1)  # [n,L]
        scores = torch.einsum("nhd,hld->hnl", q_nope, k) + torch.einsum("nhp,lp->hnl", q_rope, rope)
        weights = (scores * scale).masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[start : start + n] = torch.einsum("hnl,hlv->nhv", weights, v)
        start += n
    return out


IMPLEMENTATION = Implementation("mla_prefill", "reference", plain(mla_prefill))
