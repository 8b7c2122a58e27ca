"""mla_decode: launcher of mla_decode.h, or of mla_packed.h where pairs of bfloat16 are multiplied."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.registry import Kernel, Target, Traits


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    names = ("num_heads", "kv_lora_rank", "rope_dim", "block_size")
    num_heads, rank, rope, block_size = (int(traits[name]) for name in names)
    dtype = target.dtype
    launch = _ops.MlaDecode(kernels, num_heads, rank, rope, block_size).run

    def mla_decode(
        q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float, /
    ) -> Tensor:
        rows, queries = q_latent.shape[:2]
        num_blocks = kv_cache.shape[0]
        expect("q_latent", q_latent, dtype, (rows, queries, num_heads, rank))
        expect("q_rope", q_rope, dtype, (rows, queries, num_heads, rope))
        expect_contiguous("kv_cache", kv_cache, dtype, (num_blocks, block_size, rank + rope))
        expect("block_table", block_table, torch.int32, (rows, block_table.shape[1]))
        expect_contiguous("kv_len", kv_len, torch.int32, (rows,))
        out = torch.empty((rows, queries, num_heads, rank), dtype=dtype)
        launch(
            q_latent.data_ptr(),
            q_latent.stride(),
            q_rope.data_ptr(),
            q_rope.stride(),
            kv_cache.data_ptr(),
            num_blocks,
            block_table.data_ptr(),
            block_table.stride(0),
            block_table.shape[1],
            kv_len.data_ptr(),
            rows,
            queries,
            scale,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    return mla_decode
