"""mha_decode: softmax(scale · q·Kᵀ)·V of one token a row, in two kernels.

As `mla_decode` does it: the tiles of 64 tokens of all rows are one list, cut into one equal share a program
and KV head from the lengths on the device; a row in one share is finished there, else its partial results
are merged by the second kernel. The query heads of one KV head are the columns of transposed scores,
K·qᵀ [tokens, columns]: 64 tokens fill a tensor-core tile where 1–16 heads would not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenspeed.kernels.registry import Target, Traits
from tokenspeed.kernels.triton.launch import (
    dependency_wait,
    dependent_launch,
    is_hopper,
    num_multiprocessors,
    release_dependents,
    shared_memory,
)
from tokenspeed.kernels.triton.mla_decode import LOG2_E, _owner, merge_shares

BLOCK_N = 64


@triton.jit
def _attend(k, v, q, m, denominator, acc, scale_log2, token, length, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """One tile into the running maximum m, denominator and output acc [D, columns] (online softmax)."""
    scores = tl.dot(k, q, input_precision=PRECISION) * scale_log2
    if MASK:
        scores = tl.where((token < length)[:, None], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 0))
    p = tl.exp2(scores - m_new[None, :])
    decay = tl.exp2(m - m_new)
    acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * decay[None, :], input_precision=PRECISION)
    return m_new, denominator * decay + tl.sum(p, 0), acc


@triton.jit
def _blocks(table, tile, length, n, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The blocks of a tile's tokens: one block where tiles do not cross blocks, else one a token.

    Behind the row's last token it is the last block, so that what is read ahead lies in the table.
    """
    token = tile * BLOCK_N
    if BLOCK_SIZE % BLOCK_N != 0:
        token += n
    at = tl.maximum(tl.minimum(token, length - 1), 0) // BLOCK_SIZE
    return tl.load(table + at)


@triton.jit
def _at(values, rows, row):
    """values[row], of values that lie in registers."""
    return tl.sum(tl.where(rows == row, values, 0), 0)


@triton.jit(do_not_specialize=["num_rows"])
def _shares(  # noqa: PLR0915 - one walk, whose parts share all of its state
    q, k_cache, v_cache, k_tma, v_tma, block_table, kv_len, out, partial, lse,
    scale_log2, num_rows, table_stride, q_row, q_head,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr, COLUMN_BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    TMA: tl.constexpr, DEPENDENT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(0) // COLUMN_BLOCKS
    share = tl.program_id(1)
    num_shares = tl.num_programs(1)
    member = tl.program_id(0) % COLUMN_BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    head = kv_head * GROUP + member
    used = member < GROUP
    d = tl.arange(0, PADDED)
    inside = d < D
    n = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, ROWS)
    WIDTH: tl.constexpr = KV_HEADS * GROUP
    dependency_wait(DEPENDENT)
    # After our own wait: the merge may then read the lengths before its own.
    release_dependents(DEPENDENT)
    lengths = tl.load(kv_len + rows, mask=rows < num_rows, other=0)
    ends = tl.cumsum((lengths + BLOCK_N - 1) // BLOCK_N, 0)
    total = tl.max(ends, 0)
    # With fewer tiles than programs only so many take one: a share without a tile would leave a hole.
    num_shares = tl.minimum(num_shares, total)
    begin = tl.minimum(share * total // tl.maximum(num_shares, 1), total)
    end = tl.minimum((share + 1) * total // tl.maximum(num_shares, 1), total)
    first_row = tl.sum((ends <= begin).to(tl.int32), 0)
    last_row = tl.sum((ends < end).to(tl.int32), 0)
    mask_q = used[None, :] & inside[:, None]
    q_source = q + head[None, :] * q_head + d[:, None]
    # A row's first block and its queries are read a row ahead, its next block a tile ahead: their latency would
    # stand before the copies of K and V, where nothing else is in flight.
    next_row = tl.minimum(first_row, num_rows - 1)
    next_length = _at(lengths, rows, next_row)
    next_begin = _at(ends, rows, next_row) - (next_length + BLOCK_N - 1) // BLOCK_N
    next_block = _blocks(block_table + next_row * table_stride, begin - next_begin, next_length, n, BLOCK_SIZE, BLOCK_N)
    next_queries = tl.load(q_source + next_row * q_row, mask=mask_q, other=0.0)
    for row in range(first_row, tl.where(begin < end, last_row + 1, first_row)):
        length = next_length
        queries = next_queries
        block = next_block
        table = block_table + row * table_stride
        next_row = tl.minimum(row + 1, last_row)
        next_length = _at(lengths, rows, next_row)
        next_block = _blocks(block_table + next_row * table_stride, 0, next_length, n, BLOCK_SIZE, BLOCK_N)
        next_queries = tl.load(q_source + next_row * q_row, mask=mask_q, other=0.0)
        row_end = _at(ends, rows, row)
        row_begin = row_end - (length + BLOCK_N - 1) // BLOCK_N
        lo = tl.maximum(begin, row_begin) - row_begin
        hi = tl.minimum(end, row_end) - row_begin
        if lo < hi:
            m = tl.full([COLUMNS], float("-inf"), tl.float32)
            denominator = tl.zeros([COLUMNS], tl.float32)
            acc = tl.zeros([PADDED, COLUMNS], tl.float32)
            for tile in tl.range(lo, tl.minimum(hi, length // BLOCK_N), num_stages=STAGES):
                if TMA:
                    at = block * BLOCK_SIZE + tile * BLOCK_N % BLOCK_SIZE
                    k = k_tma.load([at, kv_head * D])
                    v = v_tma.load([at, kv_head * D])
                else:
                    at = block * BLOCK_SIZE + (tile * BLOCK_N + n) % BLOCK_SIZE
                    source = at.to(tl.int64)[:, None] * (KV_HEADS * D) + kv_head * D + d[None, :]
                    k = tl.load(k_cache + source, mask=inside[None, :], other=0.0)
                    v = tl.load(v_cache + source, mask=inside[None, :], other=0.0)
                block = _blocks(table, tl.minimum(tile + 1, hi - 1), length, n, BLOCK_SIZE, BLOCK_N)
                m, denominator, acc = _attend(
                    k, v, queries, m, denominator, acc, scale_log2, n, length, False, PRECISION
                )
            # The tile that the row fills in part, in a loop of at most one turn so that it is copied in the
            # background too. What lies behind its last token may be anything, NaN too, and 0 · NaN is NaN in
            # the product with V: so nothing of it is read.
            for tile in tl.range(tl.maximum(lo, length // BLOCK_N), hi, num_stages=2):
                token = tile * BLOCK_N + n
                at = block * BLOCK_SIZE + token % BLOCK_SIZE
                source = at.to(tl.int64)[:, None] * (KV_HEADS * D) + kv_head * D + d[None, :]
                present = (token < length)[:, None] & inside[None, :]
                k = tl.load(k_cache + source, mask=present, other=0.0)
                v = tl.load(v_cache + source, mask=present, other=0.0)
                m, denominator, acc = _attend(
                    k, v, queries, m, denominator, acc, scale_log2, token, length, True, PRECISION
                )
            result = (acc / denominator[None, :]).to(out.dtype.element_ty)
            if _owner(row_begin, total, num_shares) == _owner(row_end - 1, total, num_shares):
                tl.store(out + (row * WIDTH + head)[None, :] * D + d[:, None], result, mask=mask_q)
            else:
                at_out = (share + row) * WIDTH + head
                tl.store(partial + at_out[None, :] * D + d[:, None], result, mask=mask_q)
                tl.store(lse + at_out, m + tl.log2(denominator), mask=used)


@dataclass(frozen=True)
class Config:
    """What may be tuned. `programs`: about so many on a multiprocessor; `shares` (instead of it) for each KV head."""

    stages: int = 3
    programs: int = 2
    warps: int = 4
    tma: bool = True
    dependent: bool = True
    shares: int | None = None


class MhaDecode:
    """The op for one head shape; see `ops.MhaDecode`. The bounds `kv_lens` are for backends that plan on the host."""

    def __init__(self, num_heads: int, num_kv_heads: int, config: Config | None = None) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.config = config

    def __call__(
        self,
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
        device, block_size = q.device, k_cache.shape[1]
        out = torch.empty(rows, num_heads, head_dim, dtype=q.dtype, device=device)
        if rows == 0:
            return out
        hopper = is_hopper(device)
        padded = triton.next_power_of_2(head_dim)
        wide = q.dtype is torch.float32  # three tf32 products in place of one, which take shared memory too
        stages = 1 if wide else max(1, min(3, (shared_memory(device) - 16384) // (2 * BLOCK_N * padded * 2)))
        config = self.config or Config(stages=stages, tma=hopper, dependent=hopper)
        group = num_heads // self.num_kv_heads
        columns = max(16, min(64, triton.next_power_of_2(group)))
        column_blocks = triton.cdiv(group, columns)
        columns_in_all = self.num_kv_heads * column_blocks
        shares = config.shares or max(1, config.programs * num_multiprocessors(device) // columns_in_all)
        # One place for each (share, row) on the way from (0, 0) to (shares − 1, rows − 1).
        partial = torch.empty(shares + rows - 1, num_heads, head_dim, dtype=q.dtype, device=device)
        lse = torch.empty(shares + rows - 1, num_heads, dtype=torch.float32, device=device)
        # A descriptor's box is a power of two wide and lies in one block.
        tma = config.tma and padded == head_dim and block_size % BLOCK_N == 0
        _shares[columns_in_all, shares](
            q, k_cache, v_cache, _tiles(k_cache, tma), _tiles(v_cache, tma), block_table, kv_len, out, partial, lse,
            scale * LOG2_E, rows, block_table.stride(0), *q.stride()[:2],
            KV_HEADS=self.num_kv_heads, GROUP=group, D=head_dim, PADDED=padded, BLOCK_SIZE=block_size,
            BLOCK_N=BLOCK_N, COLUMNS=columns, COLUMN_BLOCKS=column_blocks, ROWS=triton.next_power_of_2(rows),
            TMA=tma, DEPENDENT=config.dependent, STAGES=config.stages,
            PRECISION="tf32x3" if wide else "tf32",
            num_warps=config.warps, **dependent_launch(config.dependent),
        )  # fmt: skip
        merge_shares(partial, lse, kv_len, out, shares, BLOCK_N, dependent=config.dependent)
        return out


def _tiles(cache: Tensor, tma: bool) -> Any:
    """A copy descriptor of [64, D] tiles, one head wide; without descriptors the cache stands in its place."""
    if not tma:
        return cache
    flat = cache.view(-1, cache.shape[2] * cache.shape[3])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [BLOCK_N, cache.shape[3]])


def bind(target: Target, traits: Traits) -> MhaDecode:
    return MhaDecode(int(traits["num_heads"]), int(traits["num_kv_heads"]))
