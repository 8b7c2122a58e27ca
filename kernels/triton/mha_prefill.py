"""mha_prefill: causal softmax(scale · q·Kᵀ)·V of the rows' new tokens, one program a tile of queries and head.

Online softmax over the row's tokens, straight from the paged cache. Tiles of KV that every query of the tile
sees need no mask and come through copy descriptors where the device has them; the tiles on the diagonal
are masked, and nothing behind the row's last token is read. The last tiles of the longest rows take longest
and are started first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Target, Traits
from tokenspeed.kernels.triton.launch import (
    dependency_wait,
    dependent_launch,
    is_hopper,
    release_dependents,
    shared_memory,
)
from tokenspeed.kernels.triton.mha_decode import BLOCK_N, _at, _blocks, _tiles
from tokenspeed.kernels.triton.mla_decode import LOG2_E

MIN_ROWS = 64
"""One compiled kernel serves up to so many rows."""


@triton.jit
def _attend(q, k, v, m, denominator, acc, scale_log2, token, visible, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """One tile into the running maximum m [queries], denominator and output acc [queries, D]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    if MASK:
        scores = tl.where(token[None, :] < visible[:, None], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    p = tl.exp2(scores - m_new[:, None])
    decay = tl.exp2(m - m_new)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return m_new, denominator * decay + tl.sum(p, 1), acc


# Slices of a step's rows begin anywhere: by their alignment there would be eight kernels, compiled when first met.
@triton.jit(
    do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["block_table", "query_start", "kv_len"]
)
def _prefill(
    q, k_cache, v_cache, k_tma, v_tma, block_table, query_start, kv_len, out,
    scale_log2, num_rows, table_stride, q_token, q_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr, DEPENDENT: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    kv_head = head // (HEADS // KV_HEADS)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    rows = tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, PADDED)
    inside = d < D
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    starts = tl.load(query_start + rows, mask=rows < num_rows, other=0)
    new = tl.load(query_start + rows + 1, mask=rows < num_rows, other=0) - starts
    tiles = (new + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(tiles, 0)
    row = tl.sum((ends <= tile).to(tl.int32), 0)
    first = (tile - _at(ends, rows, row) + _at(tiles, rows, row)) * BLOCK_M
    num_new = _at(new, rows, row)
    length = _at(tl.load(kv_len + rows, mask=rows < num_rows, other=0), rows, row)
    member = first + tl.arange(0, BLOCK_M)
    token = (_at(starts, rows, row) - tl.load(query_start) + member).to(tl.int64)
    mask_q = (member < num_new)[:, None] & inside[None, :]
    queries = tl.load(q + token[:, None] * q_token + head * q_head + d[None, :], mask=mask_q, other=0.0)
    visible = length - num_new + 1 + member
    full = (length - num_new + 1 + first) // BLOCK_N
    seen = tl.minimum(length, length - num_new + first + BLOCK_M)
    table = block_table + row.to(tl.int64) * table_stride
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    block = _blocks(table, 0, length, n, BLOCK_SIZE, BLOCK_N)
    for at_tile in tl.range(0, full, num_stages=STAGES):
        if TMA:
            at = block * BLOCK_SIZE + at_tile * BLOCK_N % BLOCK_SIZE
            k = k_tma.load([at, kv_head * D])
            v = v_tma.load([at, kv_head * D])
        else:
            at = block * BLOCK_SIZE + (at_tile * BLOCK_N + n) % BLOCK_SIZE
            source = at.to(tl.int64)[:, None] * (KV_HEADS * D) + kv_head * D + d[None, :]
            k = tl.load(k_cache + source, mask=inside[None, :], other=0.0)
            v = tl.load(v_cache + source, mask=inside[None, :], other=0.0)
        block = _blocks(table, at_tile + 1, length, n, BLOCK_SIZE, BLOCK_N)
        m, denominator, acc = _attend(
            queries, k, v, m, denominator, acc, scale_log2, n, visible, False, PRECISION
        )
    for at_tile in tl.range(full, (seen + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        kv_token = at_tile * BLOCK_N + n
        at = _blocks(table, at_tile, length, n, BLOCK_SIZE, BLOCK_N) * BLOCK_SIZE + kv_token % BLOCK_SIZE
        source = at.to(tl.int64)[:, None] * (KV_HEADS * D) + kv_head * D + d[None, :]
        present = (kv_token < seen)[:, None] & inside[None, :]
        k = tl.load(k_cache + source, mask=present, other=0.0)
        v = tl.load(v_cache + source, mask=present, other=0.0)
        m, denominator, acc = _attend(
            queries, k, v, m, denominator, acc, scale_log2, kv_token, visible, True, PRECISION
        )
    result = (acc / denominator[:, None]).to(out.dtype.element_ty)
    tl.store(out + (token[:, None] * HEADS + head) * D + d[None, :], result, mask=mask_q)


class MhaPrefill:
    """The op for one head shape; see `ops.MhaPrefill`. `kv_lens` are for backends that plan on the host."""

    def __init__(self, num_heads: int, num_kv_heads: int) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads

    def __call__(
        self,
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
        device, block_size = q.device, k_cache.shape[1]
        out = torch.empty(q.shape, dtype=q.dtype, device=device)
        if not query_lens:
            return out
        hopper = is_hopper(device)
        padded = triton.next_power_of_2(head_dim)
        wide = q.dtype is torch.float32
        # Few new tokens a row leave most of a large tile empty.
        block_m = 128 if not wide and padded <= 128 and max(query_lens) > 64 else 64
        if wide and padded > 128:
            block_m = 16  # what float32 leaves of the shared memory
        room = (shared_memory(device) - 16384) // (2 * BLOCK_N * padded * 2)
        stages = 1 if wide else max(1, min(3, room - block_m // BLOCK_N))
        # A descriptor's box is a power of two wide and lies in one block.
        tma = hopper and padded == head_dim and block_size % BLOCK_N == 0
        _prefill[num_heads, sum(triton.cdiv(new, block_m) for new in query_lens)](
            q, k_cache, v_cache, _tiles(k_cache, tma), _tiles(v_cache, tma), block_table, query_start, kv_len, out,
            scale * LOG2_E, len(query_lens), block_table.stride(0), *q.stride()[:2],
            HEADS=num_heads, KV_HEADS=self.num_kv_heads, D=head_dim, PADDED=padded, BLOCK_SIZE=block_size,
            BLOCK_M=block_m, BLOCK_N=BLOCK_N, ROWS=max(MIN_ROWS, triton.next_power_of_2(len(query_lens))), TMA=tma,
            DEPENDENT=hopper, STAGES=stages, PRECISION="tf32x3" if wide else "tf32",
            num_warps=8 if block_m == 128 else 4, **dependent_launch(hopper),
        )  # fmt: skip
        return out


def bind(target: Target, traits: Traits) -> MhaPrefill:
    return MhaPrefill(int(traits["num_heads"]), int(traits["num_kv_heads"]))
