"""mha_decode: launcher of attention_decode.h."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.registry import Kernel, Target, Traits


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    dtype = target.dtype
    launch = kernels.mha_decode
    num_heads, num_kv_heads, head_dim, block_size = (
        int(traits[name]) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size")
    )

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
        rows = q.shape[0]
        num_blocks = k_cache.shape[0]
        cache_shape = (num_blocks, block_size, num_kv_heads, head_dim)
        expect("q", q, dtype, (rows, num_heads, head_dim))
        expect_contiguous("k_cache", k_cache, dtype, cache_shape)
        expect_contiguous("v_cache", v_cache, dtype, cache_shape)
        expect("block_table", block_table, torch.int32, (rows, block_table.shape[1]))
        expect_contiguous("kv_len", kv_len, torch.int32, (rows,))
        if q.stride(1) != head_dim:
            q = q.contiguous()
        out = torch.empty((rows, num_heads, head_dim), dtype=dtype)
        launch(
            q.data_ptr(),
            q.stride(0),
            out.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            num_blocks,
            block_size,
            num_heads,
            num_kv_heads,
            head_dim,
            block_table.data_ptr(),
            block_table.stride(0),
            block_table.shape[1],
            kv_len.data_ptr(),
            rows,
            scale,
            torch.get_num_threads(),
        )
        return out

    return mha_decode
