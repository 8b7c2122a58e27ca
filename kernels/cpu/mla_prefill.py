"""mla_prefill: launcher of mla_prefill.h (expanded) and mla_decode.h (absorbed), whichever multiplies less for a row.

Where pairs of bfloat16 are multiplied both are in mla_packed.h.

Expanding L tokens costs as much as L absorbed queries, and then a pair of a query and a token takes N + P + V
multiplications a head instead of 2·C + P: for DeepSeek's sizes chunks of up to 170 tokens behind a long context are
absorbed. The order of the sums differs between the two, so here a prompt's bits depend on how it was chunked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops, mla_decode
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.registry import Kernel, Target, Traits


class MlaPrefill:
    """The op for one model's shape, row after row."""

    def __init__(self, kernels: _ops.Kernels, target: Target, traits: Traits) -> None:
        names = ("num_heads", "nope_dim", "v_dim", "kv_lora_rank", "rope_dim", "block_size")
        self._num_heads, self._nope, self._v, self._rank, self._rope, self._block_size = (
            int(traits[name]) for name in names
        )
        self._dtype = target.dtype
        self._decode = mla_decode.bind(kernels, target, traits)
        self._expanded = _ops.MlaPrefill(
            kernels, self._num_heads, self._nope, self._v, self._rank, self._rope, self._block_size
        )

    def __call__(
        self,
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
        tokens, rows, heads, size = q.shape[0], len(query_lens), self._num_heads, self._nope + self._rope
        expect("q", q, self._dtype, (tokens, heads, size))
        cache_shape = (kv_cache.shape[0], self._block_size, self._rank + self._rope)
        expect_contiguous("kv_cache", kv_cache, self._dtype, cache_shape)
        expect("block_table", block_table, torch.int32, (rows, block_table.shape[1]))
        expect_contiguous("query_start", query_start, torch.int32, (rows + 1,))
        expect_contiguous("kv_len", kv_len, torch.int32, (rows,))
        expect("k_up", k_up, self._dtype, (heads, self._nope, self._rank))
        expect("v_up", v_up, self._dtype, (heads, self._v, self._rank))
        if k_up.stride(1) != self._rank or v_up.stride(1) != self._rank:
            raise ValueError("rows of a head of k_up and v_up must lie together")
        if sum(query_lens) != tokens:
            raise ValueError(f"query_lens sum to {sum(query_lens)}, q has {tokens} tokens")
        if q.stride(1) != size:
            q = q.contiguous()
        out = torch.empty((tokens, heads, self._v), dtype=self._dtype)
        start = 0
        for row, (new, length) in enumerate(zip(query_lens, kv_lens, strict=True)):
            if not 0 < new <= length:
                raise IndexError(f"mla_prefill: the lengths of row {row} are out of range: {new} of {length} tokens")
            at, one = slice(start, start + new), slice(row, row + 1)
            attend = self._absorb if self._absorbs(new, length) else self._expand
            attend(q[at], kv_cache, block_table[one], kv_len[one], k_up, v_up, scale, out[at])
            start += new
        return out

    def _absorbs(self, new: int, length: int) -> bool:
        projection = (self._nope + self._v) * self._rank
        absorbed = new * (projection + length * (2 * self._rank + self._rope))
        return absorbed < length * projection + new * length * (self._nope + self._rope + self._v)

    def _absorb(
        self, q: Tensor, kv_cache: Tensor, table: Tensor, kv_len: Tensor, k_up: Tensor, v_up: Tensor, scale: float,
        out: Tensor,
    ) -> None:  # fmt: skip
        q_nope, q_rope = q.tensor_split((self._nope,), dim=-1)
        q_latent = torch.bmm(q_nope.transpose(0, 1), k_up).transpose(0, 1)
        sums = self._decode(q_latent.unsqueeze(0), q_rope.unsqueeze(0), kv_cache, table, kv_len, scale)
        out.copy_(torch.bmm(sums.squeeze(0).transpose(0, 1), v_up.transpose(1, 2)).transpose(0, 1))

    def _expand(
        self, q: Tensor, kv_cache: Tensor, table: Tensor, kv_len: Tensor, k_up: Tensor, v_up: Tensor, scale: float,
        out: Tensor,
    ) -> None:  # fmt: skip
        self._expanded.run(
            q.data_ptr(),
            q.stride(0),
            kv_cache.data_ptr(),
            kv_cache.shape[0],
            table.data_ptr(),
            table.shape[1],
            kv_len.data_ptr(),
            q.shape[0],
            k_up.data_ptr(),
            k_up.stride(0),
            v_up.data_ptr(),
            v_up.stride(0),
            scale,
            out.data_ptr(),
            torch.get_num_threads(),
        )


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    return MlaPrefill(kernels, target, traits)
