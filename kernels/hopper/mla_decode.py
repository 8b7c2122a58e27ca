"""mla_decode on Hopper: the Triton version's shares and merge, the walk over tiles placed by hand.

Two tiles of 64 tokens are kept in shared memory. Both are requested before the first is used, and a buffer is
requested again as soon as its tile is done, so memory is busy during the arithmetic (the Triton version
issues a copy only after the arithmetic of the tile before). A tile that its row fills only in part is
copied whole, and what lies behind the row's last token is set to zero in shared memory: it may be
anything, NaN too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tokenspeed.kernels.registry import Target, Traits
from tokenspeed.kernels.triton.launch import num_multiprocessors
from tokenspeed.kernels.triton.mla_decode import LOG2_E, Shares, merge_shares, padded_rows

BLOCK_N = 64


@gluon.jit
def _request(latent_tma, rope_tma, latent, rope, arrived, at, C: gl.constexpr, tile_bytes: gl.constexpr):
    """Start the copy of the 64 cache rows from `at` on."""
    mbarrier.expect(arrived, tile_bytes)
    tma.async_copy_global_to_shared(latent_tma, [at, 0], arrived, latent)
    tma.async_copy_global_to_shared(rope_tma, [at, C], arrived, rope)


@gluon.jit
def _clear_behind(latent, count, C: gl.constexpr):
    """Set all but the first `count` tokens of a tile to zero, 64 elements of each at a time."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    for part in gl.static_range(C // 64):
        piece = latent.slice(part * 64, 64, dim=1)
        value = piece.load(layout)
        piece.store(gl.where(token[:, None] < count, value, gl.zeros_like(value)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit(do_not_specialize=["num_rows", "num_queries", "table_stride"])
def _shares(  # noqa: PLR0912, PLR0915 - one walk, whose parts share all of its state
    q_latent, q_rope, latent_tma, rope_tma, block_table, kv_len, out, partial, lse,
    scale_log2, num_rows, num_queries, table_stride,
    ql_row, ql_query, ql_head, qr_row, qr_query, qr_head,
    HEADS: gl.constexpr, C: gl.constexpr, P: gl.constexpr, BLOCK_SIZE: gl.constexpr,
    COLUMNS: gl.constexpr, ROWS: gl.constexpr, IN_BLOCK: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = out.dtype.element_ty
    tile_bytes: gl.constexpr = 64 * (C + P) * 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    by_column: gl.constexpr = gl.SliceLayout(0, mma)
    by_token: gl.constexpr = gl.SliceLayout(1, mma)
    by_row: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    ql_layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    qr_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    store_layout: gl.constexpr = gl.BlockedLayout([8, 1], [32, 1], [2, 2], [0, 1])

    latent = gl.allocate_shared_memory(dtype, [2, 64, C], latent_tma.layout)
    rope = gl.allocate_shared_memory(dtype, [2, 64, P], rope_tma.layout)
    ql_shared = gl.allocate_shared_memory(
        dtype, [COLUMNS, C], gl.NVMMASharedLayout.get_default_for([COLUMNS, C], dtype)
    )
    qr_shared = gl.allocate_shared_memory(
        dtype, [COLUMNS, P], gl.NVMMASharedLayout.get_default_for([COLUMNS, P], dtype)
    )
    p_shared = gl.allocate_shared_memory(
        dtype, [64, COLUMNS], gl.NVMMASharedLayout.get_default_for([64, COLUMNS], dtype)
    )
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(arrived.index(n), count=1)
    fence_async_shared()
    gl.thread_barrier()

    share = gl.program_id(0)
    first_column = gl.program_id(1) * COLUMNS
    column = first_column + gl.arange(0, COLUMNS, layout=by_column)
    query = column // HEADS
    token = gl.arange(0, 64, layout=by_token)
    rows = gl.arange(0, ROWS, layout=by_row)
    if not IN_BLOCK:
        gdc_wait()
        gdc_launch_dependents()
    lengths = gl.load(kv_len + rows, mask=rows < num_rows, other=0)
    ends = gl.associative_scan((lengths + 63) // 64, 0, _plus)
    total = gl.max(ends, 0)
    num_shares = gl.minimum(gl.num_programs(0), total)
    begin = gl.minimum(share * total // gl.maximum(num_shares, 1), total)
    end = gl.minimum((share + 1) * total // gl.maximum(num_shares, 1), total)
    first_row = gl.sum((ends <= begin).to(gl.int32), 0)
    last_row = gl.sum((ends < end).to(gl.int32), 0)
    turn = 0  # tiles walked by this program: buffer turn % 2, used for the turn // 2-th time
    for row in range(first_row, gl.where(begin < end, last_row + 1, first_row)):
        length = gl.sum(gl.where(rows == row, lengths, 0), 0)
        row_end = gl.sum(gl.where(rows == row, ends, 0), 0)
        row_begin = row_end - (length + 63) // 64
        lo = gl.maximum(begin, row_begin) - row_begin
        hi = gl.minimum(end, row_end) - row_begin
        if lo < hi:
            table = block_table + row * table_stride
            for ahead in gl.static_range(2):
                if lo + ahead < hi:
                    if IN_BLOCK:  # noqa: SIM102 - decided when it is compiled
                        if (lo + ahead + 1) * 64 >= length:  # holds what this step stored
                            gdc_wait()
                    at = gl.load(table + (lo + ahead) * 64 // BLOCK_SIZE) * BLOCK_SIZE + (lo + ahead) * 64 % BLOCK_SIZE
                    buffer = (turn + ahead) % 2
                    _request(
                        latent_tma, rope_tma, latent.index(buffer), rope.index(buffer), arrived.index(buffer), at,
                        C, tile_bytes,
                    )  # fmt: skip
            if IN_BLOCK:
                gdc_wait()
                gdc_launch_dependents()
            column_l = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, ql_layout))
            from_l = row * ql_row + column_l // HEADS * ql_query + column_l % HEADS * ql_head
            c = gl.arange(0, C, layout=gl.SliceLayout(0, ql_layout))
            column_r = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(1, qr_layout))
            from_r = row * qr_row + column_r // HEADS * qr_query + column_r % HEADS * qr_head
            r = gl.arange(0, P, layout=gl.SliceLayout(0, qr_layout))
            ql = gl.load(
                q_latent + from_l[:, None] + c[None, :], mask=(column_l < num_queries * HEADS)[:, None], other=0.0
            )
            qr = gl.load(
                q_rope + from_r[:, None] + r[None, :], mask=(column_r < num_queries * HEADS)[:, None], other=0.0
            )
            ql_shared.store(ql)
            qr_shared.store(qr)
            fence_async_shared()
            gl.thread_barrier()
            visible = length - num_queries + 1 + query
            m = gl.full([COLUMNS], float("-inf"), gl.float32, layout=by_column)
            denominator = gl.zeros([COLUMNS], gl.float32, layout=by_column)
            acc = gl.zeros([C, COLUMNS], gl.float32, layout=mma)
            none = gl.zeros([64, COLUMNS], gl.float32, layout=mma)
            for tile in range(lo, hi):
                buffer = turn % 2
                # The block of the tile after next, long before it is needed.
                block = gl.load(table + gl.minimum(tile + 2, hi - 1) * 64 // BLOCK_SIZE)
                k = latent.index(buffer)
                mbarrier.wait(arrived.index(buffer), turn // 2 % 2)
                if (tile + 1) * 64 > length:
                    _clear_behind(k, length - tile * 64, C)
                scores = warpgroup_mma(k, ql_shared.permute((1, 0)), none, use_acc=False, is_async=True)
                scores = warpgroup_mma(rope.index(buffer), qr_shared.permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                scores = scores * scale_log2
                unseen = (tile * 64 + token)[:, None] >= visible[None, :]
                scores = gl.where(unseen, float("-inf"), scores)
                m_new = gl.maximum(m, gl.max(scores, 0))
                shift = gl.where(m_new == float("-inf"), 0.0, m_new)
                p = gl.exp2(scores - shift[None, :])
                decay = gl.exp2(m - shift)
                m = m_new
                p_shared.store(p.to(dtype))
                fence_async_shared()
                gl.thread_barrier()
                acc = acc * decay[None, :]
                acc = warpgroup_mma(k.permute((1, 0)), p_shared, acc, is_async=True)
                denominator = denominator * decay + gl.sum(p, 0)
                acc = warpgroup_mma_wait(0, deps=[acc])
                gl.thread_barrier()
                if tile + 2 < hi:
                    at = block * BLOCK_SIZE + (tile + 2) * 64 % BLOCK_SIZE
                    _request(
                        latent_tma, rope_tma, k, rope.index(buffer), arrived.index(buffer), at, C, tile_bytes
                    )  # fmt: skip
                turn += 1
            result = acc / gl.where(denominator == 0.0, 1.0, denominator)[None, :]
            result = gl.convert_layout(result.to(dtype), store_layout)
            width = num_queries * HEADS
            cs = gl.arange(0, C, layout=gl.SliceLayout(1, store_layout))
            to = first_column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, store_layout))
            first = ((row_begin + 1) * num_shares - 1) // total
            last = (row_end * num_shares - 1) // total
            alone = first == last
            if IN_BLOCK:  # never; a branch known not to be taken breaks Gluon's lowering in triton 3.6
                alone = first < 0
            if alone:
                gl.store(out + ((row * width + to) * C)[None, :] + cs[:, None], result, mask=(to < width)[None, :])
            else:
                at_partial = (share + row) * width
                gl.store(
                    partial + ((at_partial + to) * C)[None, :] + cs[:, None], result, mask=(to < width)[None, :]
                )  # fmt: skip
                gl.store(lse + at_partial + column, m + gl.log2(denominator), mask=column < width)
    # Who had no share waits too: that this kernel has ended says that all before it have.
    if IN_BLOCK:
        gdc_wait()


@gluon.jit
def _plus(a, b):
    return a + b


@dataclass(frozen=True)
class Config:
    """What may be tuned: at most so many (query, head) pairs a program, and programs in all."""

    columns: int = 32
    shares: int | None = None


class MlaDecode:
    """The op for a latent of 512 and a rotary part of 64; see `ops.MlaDecode`."""

    def __init__(self, rank: int, rope_dim: int, config: Config | None = None) -> None:
        self.rank = rank
        self.rope_dim = rope_dim
        self.config = config or Config()
        # Of the last cache, which is a layer's only one: to describe it takes the host as long as a launch.
        self._cache: Tensor | None = None
        self._described: tuple[Any, Any] = (None, None)

    def __call__(
        self, q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float, /
    ) -> Tensor:
        out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
        if q_latent.shape[0]:
            found = self._walk(q_latent, q_rope, kv_cache, block_table, kv_len, scale, out)
            merge_shares(found.partial, found.lse, kv_len, out, found.shares, BLOCK_N, dependent=True)
        return out

    def shares(
        self, q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float, /
    ) -> Shares:
        """The first kernel alone, for whoever merges: what every share found in every row it holds a part of.

        Lengths, block table and all tokens but each row's last must be older than the kernel before, which must
        release this one after its own wait: they are read before the wait here.
        """
        return self._walk(q_latent, q_rope, kv_cache, block_table, kv_len, scale, None)

    def _walk(
        self, q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float,
        out: Tensor | None,
    ) -> Shares:  # fmt: skip
        rows, num_queries, num_heads, rank = q_latent.shape
        width = num_queries * num_heads
        columns = max(16, min(self.config.columns, triton.next_power_of_2(width)))
        column_blocks = triton.cdiv(width, columns)
        shares = self.config.shares or max(1, num_multiprocessors(q_latent.device) // column_blocks)
        found = Shares.empty(shares, rows, width, rank, BLOCK_N, q_latent)
        if self._cache is not kv_cache:
            flat = kv_cache.view(-1, rank + self.rope_dim)
            self._cache, self._described = kv_cache, (_tiles(flat, rank), _tiles(flat, self.rope_dim))
        _shares[shares, column_blocks](
            q_latent, q_rope, *self._described, block_table, kv_len,
            found.partial if out is None else out, found.partial, found.lse,
            scale * LOG2_E, rows, num_queries, block_table.stride(0), *q_latent.stride()[:3], *q_rope.stride()[:3],
            HEADS=num_heads, C=rank, P=self.rope_dim, BLOCK_SIZE=kv_cache.shape[1], COLUMNS=columns,
            ROWS=padded_rows(rows, whole=out is not None), IN_BLOCK=out is None, num_warps=4, launch_pdl=True,
        )  # fmt: skip
        return found


def _tiles(flat: Tensor, width: int) -> Any:
    """A copy descriptor of [64, width] tiles."""
    kind = gl.bfloat16 if flat.dtype is torch.bfloat16 else gl.float16
    layout = gl.NVMMASharedLayout.get_default_for([BLOCK_N, width], kind)
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [BLOCK_N, width], layout)


def bind(target: Target, traits: Traits) -> MlaDecode:
    return MlaDecode(int(traits["kv_lora_rank"]), int(traits["rope_dim"]))
