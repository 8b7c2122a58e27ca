"""mla_prefill: causal latent attention of the rows' new tokens, absorbed for short chunks and expanded for long ones.

Absorbed: the key projection goes into the queries, a chunk is cut into slices of a few queries, each of which
is a row of `mla_decode`, and the value projection follows. A token of KV costs 2 · (2C + P) operations a query and
head. Expanded: keys and values of a segment of the row are projected once, 2C · (N + V) operations a token of KV and
head, then a query costs only 2 · (N + P + V). With C = 512, P = 64, N = V = 128 the two meet at 171 queries.

The expanded keys and values of a long context would not fit: a segment is as long as `WORKSPACE` allows, and
the softmax's running maximum, denominator and output go from segment to segment in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Target, Traits
from tokenspeed.kernels.selection import select
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents
from tokenspeed.kernels.triton.mha_decode import _at
from tokenspeed.kernels.triton.mla_decode import LOG2_E

ABSORBED = 128
"""Chunks of up to so many tokens are absorbed."""

COLUMNS = 64
"""(query, head) pairs of a slice: what a program of `mla_decode` takes at once."""

SLICES = 256
"""Slices of a call: as many rows of `mla_decode`, each of whose programs looks through the lengths of all."""

LN_2: tl.constexpr = tl.constexpr(math.log(2))

COPIED = 256
"""Entries of a block table that a program copies."""

WORKSPACE = 128 << 20
"""Bytes of expanded keys and values, or of absorbed queries, at a time."""


# Slices of a step's rows begin anywhere: by their alignment there would be eight kernels, compiled when first met.
@triton.jit(
    do_not_specialize=["num_rows", "width"], do_not_specialize_on_alignment=["block_table", "query_start", "kv_len"]
)
def _slices(
    block_table, query_start, kv_len, slice_table, slice_len, tokens, places, num_rows, table_stride, width,
    QUERIES: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Slice s of a row's chunk, cut from its end: the row's block table, the length that its last query sees, and
    the token of each query; places says where each token went. The first slice's missing queries are token 0."""
    s = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    starts = tl.load(query_start + rows, mask=rows < num_rows, other=0)
    new = tl.load(query_start + rows + 1, mask=rows < num_rows, other=0) - starts
    counts = (new + QUERIES - 1) // QUERIES
    ends = tl.cumsum(counts, 0)
    row = tl.sum((ends <= s).to(tl.int32), 0)
    num_new = _at(new, rows, row)
    last = num_new - QUERIES * (_at(ends, rows, row) - 1 - s)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    blocks = tl.load(block_table + row.to(tl.int64) * table_stride + column, mask=column < width, other=0)
    tl.store(slice_table + s.to(tl.int64) * width + column, blocks, mask=column < width)
    if tl.program_id(1) == 0:
        tl.store(slice_len + s, tl.load(kv_len + row) - num_new + last)
        i = tl.arange(0, PADDED)
        member = last - QUERIES + i
        token = _at(starts, rows, row) - tl.load(query_start) + member
        there = (member >= 0) & (i < QUERIES)
        tl.store(tokens + s * QUERIES + i, tl.where(there, token, 0), mask=i < QUERIES)
        tl.store(places + token, s * QUERIES + i, mask=there)


@triton.jit
def _attend(
    q, q_rope, k, rope, v, m, denominator, acc, scale_log2, token, visible, MASK: tl.constexpr, PRECISION: tl.constexpr
):
    """One tile into the running maximum m [queries], denominator and output acc [queries, V]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision=PRECISION) * scale_log2
    if MASK:
        scores = tl.where(token[None, :] < visible[:, None], scores, float("-inf"))
    m_new = tl.maximum(m, tl.max(scores, 1))
    # A query that has seen nothing yet, because its row's first tokens are not in this tile, has the maximum −inf.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASK else m_new
    p = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(m - shift)
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return m_new, denominator * decay + tl.sum(p, 1), acc


@triton.jit(
    do_not_specialize=["num_new", "segment_start", "segment_len", "lse_head"], do_not_specialize_on_alignment=["kv_len"]
)
def _expanded(
    q, keys, values, latents, kv_len, running, running_m, running_denominator, out, lse, lse_head,
    scale_log2, num_new, segment_start, segment_len, q_token, q_head,
    HEADS: tl.constexpr, N: tl.constexpr, P: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    N_PADDED: tl.constexpr, P_PADDED: tl.constexpr, V_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, HAS_LSE: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    first = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    member = first + tl.arange(0, BLOCK_M)
    present = member < num_new
    n = tl.arange(0, BLOCK_N)
    at_n = tl.arange(0, N_PADDED)
    at_p = tl.arange(0, P_PADDED)
    at_v = tl.arange(0, V_PADDED)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    source = q + member.to(tl.int64)[:, None] * q_token + head * q_head
    queries = tl.load(source + at_n[None, :], mask=present[:, None] & (at_n < N)[None, :], other=0.0)
    q_rope = tl.load(source + N + at_p[None, :], mask=present[:, None] & (at_p < P)[None, :], other=0.0)
    # Tokens of the segment that the tile's queries see: the first of them sees `some`, the last one `seen`.
    before = tl.load(kv_len) - num_new - segment_start
    # A segment need not fill its last tile, and what lies behind it is not the row's.
    visible = tl.minimum(before + 1 + member, segment_len)
    some = tl.minimum(tl.maximum(before + 1 + first, 0), segment_len)
    seen = tl.minimum(tl.maximum(before + tl.minimum(first + BLOCK_M, num_new), 0), segment_len)
    state = (member * HEADS + head).to(tl.int64)
    if FIRST:
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        denominator = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, V_PADDED], tl.float32)
    else:
        m = tl.load(running_m + state, mask=present, other=float("-inf"))
        denominator = tl.load(running_denominator + state, mask=present, other=0.0)
        acc = tl.load(
            running + state[:, None] * V + at_v[None, :], mask=present[:, None] & (at_v < V)[None, :], other=0.0
        )
    k_head = keys + head.to(tl.int64) * segment_len * N
    v_head = values + head.to(tl.int64) * segment_len * V
    full = some // BLOCK_N
    for tile in tl.range(0, full, num_stages=STAGES):
        token = tile * BLOCK_N + n
        k = tl.load(k_head + token[:, None] * N + at_n[None, :], mask=(at_n < N)[None, :], other=0.0)
        rope = tl.load(latents + token[:, None] * (C + P) + C + at_p[None, :], mask=(at_p < P)[None, :], other=0.0)
        v = tl.load(v_head + token[:, None] * V + at_v[None, :], mask=(at_v < V)[None, :], other=0.0)
        m, denominator, acc = _attend(
            queries, q_rope, k, rope, v, m, denominator, acc, scale_log2, token, visible, False, PRECISION
        )
    for tile in tl.range(full, (seen + BLOCK_N - 1) // BLOCK_N, num_stages=1):
        token = tile * BLOCK_N + n
        # What lies behind the row's last token may be anything, NaN too, and 0 · NaN is NaN in the product with V.
        there = (token < seen)[:, None]
        k = tl.load(k_head + token[:, None] * N + at_n[None, :], mask=there & (at_n < N)[None, :], other=0.0)
        rope = tl.load(
            latents + token[:, None] * (C + P) + C + at_p[None, :], mask=there & (at_p < P)[None, :], other=0.0
        )
        v = tl.load(v_head + token[:, None] * V + at_v[None, :], mask=there & (at_v < V)[None, :], other=0.0)
        m, denominator, acc = _attend(
            queries, q_rope, k, rope, v, m, denominator, acc, scale_log2, token, visible, True, PRECISION
        )
    stored = present[:, None] & (at_v < V)[None, :]
    if LAST:
        result = (acc / denominator[:, None]).to(out.dtype.element_ty)
        tl.store(out + state[:, None] * V + at_v[None, :], result, mask=stored)
        if HAS_LSE:
            tl.store(lse + head * lse_head + member, (m + tl.log2(denominator)) * LN_2, mask=present)
    else:
        tl.store(running + state[:, None] * V + at_v[None, :], acc, mask=stored)
        tl.store(running_m + state, m, mask=present)
        tl.store(running_denominator + state, denominator, mask=present)


@dataclass(frozen=True)
class Config:
    """`absorbed`: the longest chunk that is; `block_m` queries a program, `stages` of KV tiles on their way."""

    absorbed: int = ABSORBED
    block_m: int = 128
    stages: int = 2
    warps: int = 8
    workspace: int = WORKSPACE


@dataclass(frozen=True)
class Segment:
    """A row's cache rows [L, C+P] from token `start` on, and whether nothing of the row comes before or after."""

    latents: Tensor
    start: int
    first: bool = True
    last: bool = True


class MlaPrefill:
    """The op for one head shape; see `ops.MlaPrefill`."""

    def __init__(self, target: Target, traits: Traits, config: Config | None = None) -> None:
        names = ("num_heads", "nope_dim", "v_dim", "kv_lora_rank", "rope_dim", "block_size")
        self.heads, self.nope, self.value, self.rank, self.rope, self.block_size = (int(traits[name]) for name in names)
        self.config = config or Config()
        self.queries = max(1, COLUMNS // self.heads)
        self.decode = select(
            "mla_decode", target, num_heads=self.heads, kv_lora_rank=self.rank, rope_dim=self.rope,
            block_size=self.block_size,
        )  # fmt: skip

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
        out = torch.empty(q.shape[0], self.heads, self.value, dtype=q.dtype, device=q.device)
        start = 0
        for first, last in self._runs(query_lens, q.element_size()):
            stop = start + sum(query_lens[first:last])
            part, result = q[start:stop], out[start:stop]
            table, lengths = block_table[first:last], kv_len[first:last]
            if query_lens[first] <= self.config.absorbed:
                width = -(-max(kv_lens[first:last]) // self.block_size)
                starts = query_start[first : last + 1]
                up = k_up, v_up
                self._absorbed(part, kv_cache, table, starts, lengths, query_lens[first:last], width, up, scale, result)
            else:
                self._expanded(part, kv_cache, table[0], lengths, kv_lens[first], (k_up, v_up), scale, result)
            start = stop
        return out

    def _runs(self, query_lens: tuple[int, ...], element_size: int) -> Iterator[tuple[int, int]]:
        """Ranges of neighbouring rows: short chunks as far as workspace and slices go, a long one alone."""
        room = max(1, self.config.workspace // (self.heads * self.rank * element_size))
        queries, most = self.queries, self.config.absorbed
        first = taken = slices = 0
        for row, new in enumerate(query_lens):
            more = triton.cdiv(new, queries)
            full = taken + new > room or slices + more > SLICES
            if first < row and (full or new > most or query_lens[first] > most):
                yield first, row
                first, taken, slices = row, 0, 0
            taken += new
            slices += more
        if query_lens:
            yield first, len(query_lens)

    def _absorbed(
        self, q: Tensor, kv_cache: Tensor, block_table: Tensor, query_start: Tensor, kv_len: Tensor,
        query_lens: tuple[int, ...], width: int, up: tuple[Tensor, Tensor], scale: float, out: Tensor,
    ) -> None:  # fmt: skip
        k_up, v_up = up
        # One kernel for a token a row and one for more, not one for every number that a chunk may have.
        queries = 1 if max(query_lens) == 1 else self.queries
        num_slices = sum(triton.cdiv(new, queries) for new in query_lens)
        empty = partial(torch.empty, dtype=torch.int32, device=q.device)
        table, lengths = empty((num_slices, width)), empty(num_slices)
        tokens, places = empty(num_slices * queries), empty(q.shape[0])
        dependent = is_hopper(q.device)
        _slices[num_slices, triton.cdiv(width, COPIED)](
            block_table, query_start, kv_len, table, lengths, tokens, places,
            len(query_lens), block_table.stride(0), width,
            QUERIES=queries, PADDED=triton.next_power_of_2(queries),
            ROWS=SLICES,
            BLOCK=COPIED, DEPENDENT=dependent, num_warps=4, **dependent_launch(dependent),
        )  # fmt: skip
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent = torch.bmm(q_nope.transpose(0, 1), k_up).transpose(0, 1)
        sliced = [each.index_select(0, tokens).unflatten(0, (num_slices, queries)) for each in (latent, q_rope)]
        sums = self.decode(*sliced, kv_cache, table, lengths, scale).flatten(0, 1).index_select(0, places)
        torch.bmm(sums.transpose(0, 1), v_up.transpose(1, 2), out=out.transpose(0, 1))

    def _expanded(
        self, q: Tensor, kv_cache: Tensor, table: Tensor, kv_len: Tensor, length: int, up: tuple[Tensor, Tensor],
        scale: float, out: Tensor,
    ) -> None:  # fmt: skip
        """One row: q [n,H,N+P] of the `length` tokens of the row's block table → out [n,H,V]."""
        new, device = q.shape[0], q.device
        blocks = table[: triton.cdiv(length, self.block_size)]
        a_block = self.heads * (self.nope + self.value) * q.element_size() * self.block_size
        together = max(1, self.config.workspace // a_block)
        starts = range(0, blocks.shape[0], together)
        # Of a lone segment nothing is kept. What stands for it is aligned, so that none compiles a kernel of its own.
        running = m = denominator = out
        if len(starts) > 1:
            running = torch.empty(new, self.heads, self.value, dtype=torch.float32, device=device)
            m, denominator = torch.empty(2, new, self.heads, dtype=torch.float32, device=device)
        for start in starts:
            latents = kv_cache.index_select(0, blocks[start : start + together]).flatten(0, 1)
            segment = Segment(latents, start * self.block_size, start == 0, start == starts[-1])
            self.attend(q, segment, kv_len, up, scale, (running, m, denominator), out)

    def attend(
        self, q: Tensor, segment: Segment, kv_len: Tensor, up: tuple[Tensor, Tensor], scale: float,
        running: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Queries q [n,H,N+P], the last n tokens of their row, over a segment of it. What goes from segment to segment
        is kept in `running`; the last one writes out [n,H,V] and, if asked, the log-sum-exp [H,≥n]."""
        heads, new, wide, latents = self.heads, q.shape[0], q.dtype is torch.float32, segment.latents
        # Rows of all heads are one matrix each of keys and of values; the latents are the same for every head.
        shared = latents[:, : self.rank].expand(heads, -1, -1)
        k, v = (torch.bmm(shared, each.transpose(1, 2)) for each in up)
        block_m, dependent = 16 if wide else self.config.block_m, is_hopper(q.device)
        _expanded[heads, triton.cdiv(new, block_m)](
            q, k, v, latents, kv_len, *running, out, lse, 0 if lse is None else lse.stride(0),
            scale * LOG2_E, new, segment.start, latents.shape[0], *q.stride()[:2],
            HEADS=heads, N=self.nope, P=self.rope, V=self.value, C=self.rank,
            N_PADDED=_padded(self.nope), P_PADDED=_padded(self.rope), V_PADDED=_padded(self.value),
            BLOCK_M=block_m, BLOCK_N=32 if wide else 64, FIRST=segment.first, LAST=segment.last,
            HAS_LSE=lse is not None, STAGES=1 if wide else self.config.stages,
            PRECISION="tf32x3" if wide else "tf32", DEPENDENT=dependent,
            num_warps=4 if wide else self.config.warps, **dependent_launch(dependent),
        )  # fmt: skip


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


def bind(target: Target, traits: Traits) -> MlaPrefill:
    return MlaPrefill(target, traits)
