"""mha_decode: softmax(scale · q·Kᵀ)·V of one token a row, all rows padded to the longest."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Implementation, plain


def mha_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    kv_len: Tensor,
    kv_lens: tuple[int, ...],
    scale: float,
    /,
) -> Tensor:
    rows, num_heads, head_dim = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_blocks = -(-max(kv_lens, default=0) // block_size)
    position = torch.arange(num_blocks * block_size, device=q.device)
    absent = position >= kv_len.unsqueeze(1)  # [R,L]
    # Entries past a row's length are undefined: any block that exists stands in for them.
    table = block_table[:, :num_blocks].long().masked_fill(absent[:, ::block_size], 0)
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (
        cache[table].reshape(rows, -1, num_kv_heads, head_dim).to(wide).masked_fill(absent[:, :, None, None], 0)
        for cache in (k_cache, v_cache)
    )
    groups = q.to(wide).view(rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("rhgd,rlhd->rhgl", groups, k) * scale
    weights = scores.masked_fill(absent[:, None, None, :], float("-inf")).softmax(dim=-1)
    # A row without tokens has weights of 0/0; it gives zeros.
    weights = weights.masked_fill((kv_len == 0)[:, None, None, None], 0)
    return torch.einsum("rhgl,rlhd->rhgd", weights, v).reshape(rows, num_heads, head_dim).to(q.dtype)


IMPLEMENTATION = Implementation("mha_decode", "reference", plain(mha_decode))
