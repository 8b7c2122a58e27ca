"""mha_prefill: causal softmax(scale · q·Kᵀ)·V, row after row."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Implementation, plain


def mha_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start: Tensor,
    kv_len: Tensor,
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    scale: float,
    /,
) -> Tensor:
    num_heads, head_dim = q.shape[1:]
    block_size, num_kv_heads = k_cache.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    start = 0
    for row, (n, length) in enumerate(zip(query_lens, kv_lens, strict=True)):
        table = block_table[row, : -(-length // block_size)].long()
        k, v = (cache[table].flatten(0, 1)[:length].to(wide) for cache in (k_cache, v_cache))
        groups = q[start : start + n].to(wide).view(n, num_kv_heads, num_heads // num_kv_heads, head_dim)
        visible = kv_len[row] - n + 1 + torch.arange(n, device=q.device)
        hidden = torch.arange(length, device=q.device) >= visible.unsqueeze(1)  # [n,L]
        scores = torch.einsum("nhgd,lhd->hgnl", groups, k) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        out[start : start + n] = torch.einsum("hgnl,lhd->nhgd", weights, v).reshape(n, num_heads, head_dim)
        start += n
    return out


IMPLEMENTATION = Implementation("mha_prefill", "reference", plain(mha_prefill))
