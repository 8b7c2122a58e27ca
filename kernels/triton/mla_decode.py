"""mla_decode: softmax(scale · q·Kᵀ)·V in the latent space, in two kernels.

The KV of all rows is one list of tiles of up to 64 tokens, cut into one equal share a program: a program
finds its share from the lengths on the device, so a launch depends on neither lengths nor raggedness.
Program p walks its share row by row. A row that lies in one share is finished there; else each share
leaves a partial result (softmax weights normalised within the share, log-sum-exp beside it) in place
p + row, which is unique because along the list neither p nor row ever falls, and the second kernel
merges them. Scores are transposed, K·qᵀ [tokens, columns], a column being one query of one head: the 64
tokens fill a tensor-core tile where 16 heads would not, and K and V are the same tile in shared memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenspeed.kernels.registry import Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, is_hopper, num_multiprocessors, release_dependents

LOG2_E = math.log2(math.e)

FEWEST = 16
"""Rows that fewer are padded to where that costs nothing: their lengths fill half a warp."""


@triton.jit
def _tile_ends(kv_len, num_rows, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """For each row the end of its tiles in the list of all tiles."""
    rows = tl.arange(0, ROWS)
    lengths = tl.load(kv_len + rows, mask=rows < num_rows, other=0)
    return tl.cumsum((lengths + BLOCK_N - 1) // BLOCK_N, 0)


@triton.jit
def _owner(tile, total, num_programs):
    """The program whose share [p · total // n, (p + 1) · total // n) holds the tile."""
    return ((tile + 1) * num_programs - 1) // total


@triton.jit
def _attend(latent, rope, q_latent, q_rope, m, denominator, acc, scale_log2, token, visible, MASK: tl.constexpr):
    """One tile into the running maximum m, denominator and output acc [C, columns] (online softmax)."""
    scores = tl.dot(latent, q_latent)
    scores = tl.dot(rope, q_rope, scores) * scale_log2
    if MASK:
        scores = tl.where(token[:, None] < visible[None, :], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 0))
    # A column that has seen nothing yet has the maximum −inf, and −inf − −inf is no number.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASK else m_new
    p = tl.exp2(scores - shift[None, :])
    decay = tl.exp2(m - shift)
    acc = tl.dot(tl.trans(latent), p.to(latent.dtype), acc * decay[None, :])
    return m_new, denominator * decay + tl.sum(p, 0), acc


# A table cut from a step's is as wide as its longest row: no width may compile a kernel of its own.
@triton.jit(do_not_specialize=["num_rows", "num_queries", "table_stride"])
def _shares(  # noqa: PLR0915 - one walk, whose parts share all of its state
    q_latent, q_rope, kv, latent_tma, rope_tma, block_table, kv_len, out, partial, lse,
    scale_log2, num_rows, num_queries, table_stride,
    ql_row, ql_query, ql_head, qr_row, qr_query, qr_head,
    HEADS: tl.constexpr, C: tl.constexpr, P: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, ONE_QUERY: tl.constexpr, FINISH: tl.constexpr, TMA: tl.constexpr,
    DEPENDENT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    share = tl.program_id(0)
    num_shares = tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    query = column // HEADS
    head = column % HEADS
    used = query < num_queries
    c = tl.arange(0, C)
    r = tl.arange(0, P)
    n = tl.arange(0, BLOCK_N)
    rows = tl.arange(0, ROWS)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    ends = _tile_ends(kv_len, num_rows, ROWS, BLOCK_N)
    total = tl.max(ends, 0)
    # With fewer tiles than programs only so many take one: a share without a tile would leave a hole.
    num_shares = tl.minimum(num_shares, total)
    begin = tl.minimum(share * total // tl.maximum(num_shares, 1), total)
    end = tl.minimum((share + 1) * total // tl.maximum(num_shares, 1), total)
    first_row = tl.sum((ends <= begin).to(tl.int32), 0)
    last_row = tl.sum((ends < end).to(tl.int32), 0)
    for row in range(first_row, tl.where(begin < end, last_row + 1, first_row)):
        length = tl.load(kv_len + row)
        row_tiles = (length + BLOCK_N - 1) // BLOCK_N
        row_end = tl.sum(tl.where(rows == row, ends, 0), 0)
        row_begin = row_end - row_tiles
        lo = tl.maximum(begin, row_begin) - row_begin
        hi = tl.minimum(end, row_end) - row_begin
        if lo < hi:
            # The block of the next tile is read a turn ahead: its latency would stand before every copy.
            table = block_table + row * table_stride
            block = tl.load(table + lo * BLOCK_N // BLOCK_SIZE)
            ql = tl.load(
                q_latent + row * ql_row + (query * ql_query + head * ql_head)[None, :] + c[:, None],
                mask=used[None, :], other=0.0,
            )  # fmt: skip
            qr = tl.load(
                q_rope + row * qr_row + (query * qr_query + head * qr_head)[None, :] + r[:, None],
                mask=used[None, :], other=0.0,
            )  # fmt: skip
            visible = length - num_queries + 1 + query
            m = tl.full([COLUMNS], float("-inf"), tl.float32)
            denominator = tl.zeros([COLUMNS], tl.float32)
            acc = tl.zeros([C, COLUMNS], tl.float32)
            for tile in tl.range(lo, tl.minimum(hi, length // BLOCK_N), num_stages=STAGES):
                at = block * BLOCK_SIZE + tile * BLOCK_N % BLOCK_SIZE
                block = tl.load(table + tl.minimum(tile + 1, hi - 1) * BLOCK_N // BLOCK_SIZE)
                if TMA:
                    latent = latent_tma.load([at, 0])
                    rope = rope_tma.load([at, C])
                else:
                    kv_rows = kv + (at + n[:, None]).to(tl.int64) * (C + P)
                    latent = tl.load(kv_rows + c[None, :])
                    rope = tl.load(kv_rows + C + r[None, :])
                token = tile * BLOCK_N + n
                m, denominator, acc = _attend(
                    latent, rope, ql, qr, m, denominator, acc, scale_log2, token, visible, not ONE_QUERY
                )
            # The tile that the row fills in part, in a loop of at most one turn so that it is copied in the
            # background too. What lies behind its last token may be anything, NaN too, and 0 · NaN is NaN in
            # the product with V: so nothing of it is read.
            for tile in tl.range(tl.maximum(lo, length // BLOCK_N), hi, num_stages=2):
                at = block * BLOCK_SIZE + tile * BLOCK_N % BLOCK_SIZE
                token = tile * BLOCK_N + n
                kv_rows = kv + (at + n[:, None]).to(tl.int64) * (C + P)
                latent = tl.load(kv_rows + c[None, :], mask=token[:, None] < length, other=0.0)
                rope = tl.load(kv_rows + C + r[None, :], mask=token[:, None] < length, other=0.0)
                m, denominator, acc = _attend(
                    latent, rope, ql, qr, m, denominator, acc, scale_log2, token, visible, True
                )
            result = (acc / tl.where(denominator == 0.0, 1.0, denominator)[None, :]).to(out.dtype.element_ty)
            width = num_queries * HEADS
            alone = _owner(row_begin, total, num_shares) == _owner(row_end - 1, total, num_shares)
            if alone & FINISH:
                at_out = row * width + column
                tl.store(out + at_out[None, :] * C + c[:, None], result, mask=used[None, :])
            else:
                at_out = (share + row) * width + column
                tl.store(partial + at_out[None, :] * C + c[:, None], result, mask=used[None, :])
                tl.store(lse + at_out, m + tl.log2(denominator), mask=used)


@triton.jit
def share_count(kv_len, row, num_rows, num_shares, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first share of a row, and in how many it lies."""
    rows = tl.arange(0, ROWS)
    tiles = (tl.load(kv_len + rows, mask=rows < num_rows, other=0) + BLOCK_N - 1) // BLOCK_N
    total = tl.sum(tiles, 0)
    num_shares = tl.minimum(num_shares, total)
    row_end = tl.sum(tl.where(rows <= row, tiles, 0), 0)
    row_begin = row_end - tl.sum(tl.where(rows == row, tiles, 0), 0)
    first = _owner(row_begin, tl.maximum(total, 1), num_shares)
    last = _owner(row_end - 1, tl.maximum(total, 1), num_shares)
    return first, tl.where(row_end == row_begin, 0, last - first + 1)


@triton.jit(do_not_specialize=["num_rows", "num_shares"])
def _merge(
    partial, lse, kv_len, out, num_rows, num_shares,
    C: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1)
    width = tl.num_programs(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    # The lengths are older than the kernel before this one, which waits before it lets this one start.
    first, count = share_count(kv_len, row, num_rows, num_shares, ROWS, BLOCK_N)
    to = out + (row * width + column) * C + c
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    if count == 0:
        tl.store(to, tl.zeros([BLOCK_C], out.dtype.element_ty))
    elif count > 1:
        s = tl.arange(0, BLOCK_S)
        m = tl.full([BLOCK_S], float("-inf"), tl.float32)
        denominator = tl.zeros([BLOCK_S], tl.float32)
        acc = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for start in range(0, count, BLOCK_S):
            present = start + s < count
            at = (first + row + start + s) * width + column
            weight = tl.load(lse + at, mask=present, other=float("-inf"))
            value = tl.load(partial + at[:, None] * C + c[None, :], mask=present[:, None], other=0.0)
            m_new = tl.maximum(m, weight)
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            decay = tl.exp2(m - shift)
            weight = tl.exp2(weight - shift)
            denominator = denominator * decay + weight
            acc = acc * decay[:, None] + value.to(tl.float32) * weight[:, None]
            m = m_new
        peak = tl.max(m, 0)
        weight = tl.exp2(m - tl.where(peak == float("-inf"), 0.0, peak))
        denominator_all = tl.sum(denominator * weight, 0)
        result = tl.sum(acc * weight[:, None], 0) / tl.where(denominator_all == 0.0, 1.0, denominator_all)
        tl.store(to, result.to(out.dtype.element_ty))


@dataclass(frozen=True)
class Config:
    """What may be tuned. `columns`: at most so many (query, head) pairs a program; `dependent`: programmatic launch."""

    stages: int = 2
    columns: int | None = None
    tma: bool = True
    dependent: bool = True
    shares: int | None = None


class Shares(NamedTuple):
    """What the first kernel leaves: `partial` [places, Q·Hq, C] and its log2-sum-exp `lse` [places, Q·Hq] float32, a
    place for each (share, row) on the way from (0, 0) to (shares − 1, rows − 1); `shares` programs, tiles of `block_n`
    tokens."""

    partial: Tensor
    lse: Tensor
    shares: int
    block_n: int

    @classmethod
    def empty(cls, shares: int, rows: int, width: int, rank: int, block_n: int, like: Tensor) -> Self:
        partial = torch.empty(shares + rows - 1, width, rank, dtype=like.dtype, device=like.device)
        lse = torch.empty(shares + rows - 1, width, dtype=torch.float32, device=like.device)
        return cls(partial, lse, shares, block_n)


class MlaDecode:
    """The op for one head shape; see `ops.MlaDecode`."""

    def __init__(self, rank: int, rope_dim: int, config: Config | None = None) -> None:
        self.rank = rank
        self.rope_dim = rope_dim
        self.config = config

    def __call__(
        self, q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float, /
    ) -> Tensor:
        out = torch.empty(q_latent.shape, dtype=q_latent.dtype, device=q_latent.device)
        if q_latent.shape[0]:
            found = self._walk(q_latent, q_rope, kv_cache, block_table, kv_len, scale, out)
            dependent = self._config(q_latent.device).dependent
            merge_shares(found.partial, found.lse, kv_len, out, found.shares, found.block_n, dependent=dependent)
        return out

    def shares(
        self, q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float, /
    ) -> Shares:
        """The first kernel alone, for whoever merges: what every share found in every row it holds a part of."""
        return self._walk(q_latent, q_rope, kv_cache, block_table, kv_len, scale, None)

    def _config(self, device: torch.device) -> Config:
        hopper = is_hopper(device)
        return self.config or Config(tma=hopper, dependent=hopper)

    def _walk(
        self, q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float,
        out: Tensor | None,
    ) -> Shares:  # fmt: skip
        rows, num_queries, num_heads, rank = q_latent.shape
        device, block_size = q_latent.device, kv_cache.shape[1]
        config = self._config(device)
        block_n = math.gcd(64, block_size)
        width = num_queries * num_heads
        # 64 columns take 8 warps at the register limit: worth it only where 32 would read the cache four times.
        most = config.columns or (32 if width <= 64 else 64)
        columns = max(16, min(most, triton.next_power_of_2(width)))
        column_blocks = triton.cdiv(width, columns)
        shares = config.shares or max(1, num_multiprocessors(device) // column_blocks)
        found = Shares.empty(shares, rows, width, rank, block_n, q_latent)
        flat = kv_cache.view(-1, rank + self.rope_dim)
        pool: tuple[Any, Any] = (flat, flat)
        if config.tma:
            shape, strides = list(flat.shape), list(flat.stride())
            pool = (
                TensorDescriptor(flat, shape, strides, [block_n, rank]),
                TensorDescriptor(flat, shape, strides, [block_n, self.rope_dim]),
            )
        launch = {"launch_pdl": True} if config.dependent else {}
        _shares[shares, column_blocks](
            q_latent, q_rope, flat, *pool, block_table, kv_len, found.partial if out is None else out,
            found.partial, found.lse,
            scale * LOG2_E, rows, num_queries, block_table.stride(0),
            *q_latent.stride()[:3], *q_rope.stride()[:3],
            HEADS=num_heads, C=rank, P=self.rope_dim, BLOCK_SIZE=block_size, BLOCK_N=block_n, COLUMNS=columns,
            ROWS=padded_rows(rows, whole=out is not None), ONE_QUERY=num_queries == 1, FINISH=out is not None,
            TMA=config.tma, DEPENDENT=config.dependent, STAGES=config.stages, num_warps=8 if columns > 32 else 4,
            **launch,
        )  # fmt: skip
        return found


def padded_rows(rows: int, *, whole: bool) -> int:
    """Rows that a program looks through: a power of two. Where what they give is merged as a `whole` no small one: such
    steps are of any number of rows, and each power is a kernel that is compiled when it is first met."""
    return max(FEWEST if whole else 1, int(triton.next_power_of_2(rows)))


def merge_shares(
    partial: Tensor, lse: Tensor, kv_len: Tensor, out: Tensor, shares: int, block_n: int, *, dependent: bool
) -> None:
    """The second kernel: `out` of the rows that lie in no share or in several."""
    rows, rank = out.shape[0], out.shape[-1]
    block_c, block_s = _merge_shape(rows, rank)
    warps = max(1, min(4, block_c * block_s // 512))
    _merge[rows, partial.shape[1], rank // block_c](
        partial, lse, kv_len, out, rows, shares,
        C=rank, BLOCK_N=block_n, ROWS=padded_rows(rows, whole=True), BLOCK_C=block_c, BLOCK_S=block_s,
        DEPENDENT=dependent, num_warps=warps, **({"launch_pdl": True} if dependent else {}),
    )  # fmt: skip


def _merge_shape(rows: int, rank: int) -> tuple[int, int]:
    """(elements, partial results a turn) of a merging program: few rows have many partials, many rows have few."""
    power = rank & -rank
    if rows <= 2:
        return min(power, 64), 64
    if rows <= 16:
        return min(power, 128), 16
    return power, 4


def bind(target: Target, traits: Traits) -> MlaDecode:
    return MlaDecode(int(traits["kv_lora_rank"]), int(traits["rope_dim"]))
