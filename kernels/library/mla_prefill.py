"""mla_prefill of long chunks: keys and values expanded in pieces, cuDNN's attention over each, one merge at the end.

A chunk of n tokens behind p cached ones is the causal square of its own tokens, full pieces of 8,192, and a rest that
the Triton version takes. Each part gives its output and the log-sum-exp of its scores, and the parts are weighed by
these: out = Σ exp(lse_i) out_i / Σ exp(lse_i). On an H100 cuDNN reaches 540 TFLOP/s over the causal square of 8,192 and
640 over full pieces, the Triton version about 380.

cuDNN builds a plan, 35 to 70 ms of host time, for every combination of lengths, and torch keeps the plans by thread.
Hence few lengths: pieces are of one, and queries are padded to the next of `chunks`, which from 1,024 on costs nothing
where it fills up a wave (16 heads of 8 tiles on 132 multiprocessors). And hence one thread of our own that all of it
goes through (`one_thread.py`), whichever thread runs a step. The padding of a causal square lies behind its last query:
no query that counts sees it, and its keys and values are zeros because 0 · NaN is NaN.

A short chunk has few tiles of queries: up to four pieces are one call then, a batch, for whole waves of the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.one_thread import enqueued
from tokenspeed.kernels.registry import Target, Traits
from tokenspeed.kernels.triton import mla_prefill as by_tiles
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents

Part = tuple[Tensor, Tensor]
"""Of some keys: out [S,H,V] and the natural logarithm of the sum of exp(scores) [H,S], contiguous. The first n ≤ S
queries count."""

Attend = Callable[[Tensor, Tensor, Tensor, bool, float], Part]
"""q [B,S,H,N+P], k [B,L,H,N+P], v [B,L,H,V], causal, scale → out [B,S,H,V] and log-sum-exp [B,H,S] of each of B."""

TOKENS = 32
"""Cache rows that a program fetches."""

PARTS = 8
"""Parts that one merge takes."""


AT_ONCE = 4
"""Pieces that one call takes at most."""

TILES = 512
"""Tiles of 128 queries and a head that are enough for a call: four on each of 132 multiprocessors."""


@dataclass(frozen=True)
class Lengths:
    """Those that plans are built for: pieces of `piece` tokens, and `chunks`, ascending. Chunks below `shortest` with
    no piece before them are left to the Triton version: four launches where this takes nine. At 1,024 tokens
    of 16 heads the device computes 14 µs instead of 10 at the rates above, and the host is spared twenty times that."""

    piece: int = 8192
    chunks: tuple[int, ...] = (256, 384, 512, 768, 1024, 1536, *range(2048, 8193, 1024))
    shortest: int = 1025


# Rows of a step begin anywhere, and no length may compile a kernel of its own.
@triton.jit(do_not_specialize=["first", "counts_back", "count"], do_not_specialize_on_alignment=["table", "kv_len"])
def _fetch(
    cache, table, kv_len, latents, keys, first, counts_back, count,
    HEADS: tl.constexpr, N: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Row i of latents [·,C] and the rotated part of keys [·,H,N+P]: token `first` + i of the row, zeros from `count`
    on. `first` counts from the row's end if `counts_back` is 1."""
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, C)
    p = tl.arange(0, P)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    token = first + counts_back * tl.load(kv_len) + i
    there = i < count
    block = tl.load(table + token // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
    source = cache + (block * BLOCK_SIZE + token % BLOCK_SIZE)[:, None] * (C + P)
    latent = tl.load(source + c[None, :], mask=there[:, None], other=0.0)
    rope = tl.load(source + C + p[None, :], mask=there[:, None], other=0.0)
    tl.store(latents + i[:, None] * C + c[None, :], latent)
    for head in range(HEADS):
        tl.store(keys + (i * HEADS + head)[:, None] * (N + P) + N + p[None, :], rope)


@triton.jit(do_not_specialize=["count", "num_parts", "lse_head"])
def _merge(
    outs, lses, out, lse, count, num_parts, lse_head,
    HEADS: tl.constexpr, V: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    head = tl.program_id(1)
    present = token < count
    at = (token * HEADS + head)[:, None] * V + tl.arange(0, V)[None, :]
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    m = tl.full([TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    acc = tl.zeros([TOKENS, V], tl.float32)
    for part in tl.static_range(PARTS):
        if part < num_parts:
            score = tl.load(lses[part] + head * lse_head + token, mask=present, other=0.0)
            value = tl.load(outs[part] + at, mask=present[:, None], other=0.0).to(tl.float32)
            higher = tl.maximum(m, score)
            decay = tl.exp(m - higher)
            weight = tl.exp(score - higher)
            acc = acc * decay[:, None] + weight[:, None] * value
            total = total * decay + weight
            m = higher
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=present[:, None])
    tl.store(lse + head * lse_head + token, m + tl.log(total), mask=present)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Part:
    """cuDNN's, through torch; see `Attend`. Queries and keys of a causal call are as many."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(each.transpose(1, 2) for each in (q, k, v)), None, True, 0.0, causal, False, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse.reshape(lse.shape[:3])


def at_once(size: int, heads: int) -> int:
    """Pieces that a call takes for a chunk of `size` tokens: a power of two."""
    pieces = 1
    while pieces < AT_ONCE and pieces * heads * (size // 128) < TILES:
        pieces *= 2
    return pieces


class MlaPrefill(by_tiles.MlaPrefill):
    """The op for one head shape; see `ops.MlaPrefill`. Long chunks belong to prompts: the host knows their length."""

    def __init__(
        self, target: Target, traits: Traits, lengths: Lengths | None = None, attention: Attend = cudnn_attention,
        config: by_tiles.Config | None = None,
    ) -> None:  # fmt: skip
        super().__init__(target, traits, config)
        self.lengths = lengths or Lengths()
        self.attention = attention
        # A rest begins where a block does.
        whole = math.lcm(self.block_size, TOKENS)
        self.piece = max(1, self.lengths.piece // whole) * whole

    def __call__(
        self, q: Tensor, kv_cache: Tensor, block_table: Tensor, query_start: Tensor, kv_len: Tensor,
        query_lens: tuple[int, ...], kv_lens: tuple[int, ...], k_up: Tensor, v_up: Tensor, scale: float, /,
    ) -> Tensor:  # fmt: skip
        rows = partial(
            super().__call__, q, kv_cache, block_table, query_start, kv_len, query_lens, kv_lens, k_up, v_up, scale
        )
        if not (q.is_cuda and any(map(self._in_pieces, query_lens, kv_lens))):
            return rows()
        return enqueued(rows, q.device)

    def _expanded(
        self, q: Tensor, kv_cache: Tensor, table: Tensor, kv_len: Tensor, length: int, up: tuple[Tensor, Tensor],
        scale: float, out: Tensor,
    ) -> None:  # fmt: skip
        if self._in_pieces(q.shape[0], length):
            self._chunks(q, _Row(kv_cache, table, kv_len, length, up, scale), out)
        else:
            super()._expanded(q, kv_cache, table, kv_len, length, up, scale, out)

    def _in_pieces(self, new: int, length: int) -> bool:
        """Whether cuDNN takes a row's chunk of `new` tokens, the last of `length`."""
        return new > self.config.absorbed and (new >= self.lengths.shortest or length - new >= self.piece)

    def _chunks(self, q: Tensor, row: _Row, out: Tensor) -> None:
        most = self.lengths.chunks[-1]
        for start in range(0, q.shape[0], most):
            stop = min(start + most, q.shape[0])
            self._chunk(q[start:stop], row, q.shape[0] - start, out[start:stop])

    def _chunk(self, q: Tensor, row: _Row, back: int, out: Tensor) -> None:
        """The queries of the tokens that begin `back` before the row's end."""
        new = q.shape[0]
        size = next(chunk for chunk in self.lengths.chunks if chunk >= new)
        padded = q if new == size else functional.pad(q, (0, 0, 0, 0, 0, size - new))
        parts = self._parts(padded, self._expand(row, -back, new, size), 1, row.scale)
        prefix = row.length - back
        rest = prefix % self.piece
        start, together = 0, at_once(size, self.heads)
        while start < prefix - rest:
            while together * self.piece > prefix - rest - start:
                together //= 2
            if len(parts) + together > PARTS:
                parts = [_merged(parts, new)]
            tokens = together * self.piece
            parts += self._parts(padded, self._expand(row, start, tokens, tokens), together, row.scale, causal=False)
            start += tokens
        if rest:
            if len(parts) == PARTS:
                parts = [_merged(parts, new)]
            parts.append(self._rest(q, row, prefix - rest, rest, size))
        _merged(parts, new, out)

    def _parts(self, q: Tensor, kv: Part, pieces: int, scale: float, causal: bool = True) -> list[Part]:
        """Those of `pieces` neighbouring pieces of keys and values, each with all queries."""
        k, v = (each.view(pieces, -1, *each.shape[1:]) for each in kv)
        out, lse = self.attention(q.expand(pieces, *q.shape).contiguous(), k, v, causal, scale)
        return [(out[piece], lse[piece]) for piece in range(pieces)]

    def _expand(self, row: _Row, first: int, count: int, size: int) -> Part:
        """Keys [S,H,N+P] and values [S,H,V] of `count` tokens from `first` on (from the row's end if negative), the
        others of S zeros."""
        cache, heads, dependent = row.kv_cache, self.heads, is_hopper(row.kv_cache.device)
        empty = partial(torch.empty, dtype=cache.dtype, device=cache.device)
        latents, keys = empty(size, self.rank), empty(size, heads, self.nope + self.rope)
        values = empty(size, heads, self.value)
        _fetch[size // TOKENS,](
            cache, row.table, row.kv_len, latents, keys, first, int(first < 0), count,
            HEADS=heads, N=self.nope, P=self.rope, C=self.rank, BLOCK_SIZE=self.block_size, TOKENS=TOKENS,
            DEPENDENT=dependent, num_warps=8, **dependent_launch(dependent),
        )  # fmt: skip
        shared = latents.expand(heads, -1, -1)
        for each, to in zip(row.up, (keys[..., : self.nope], values), strict=True):
            torch.bmm(shared, each.transpose(1, 2), out=to.transpose(0, 1))
        return keys, values

    def _rest(self, q: Tensor, row: _Row, start: int, count: int, size: int) -> Part:
        """The part of fewer cached tokens than a piece has."""
        first = start // self.block_size
        blocks = row.table[first : first + triton.cdiv(count, self.block_size)]
        latents = row.kv_cache.index_select(0, blocks).flatten(0, 1)[:count]
        out = torch.empty(*q.shape[:2], self.value, dtype=q.dtype, device=q.device)
        lse = torch.empty(self.heads, size, dtype=torch.float32, device=q.device)
        segment = by_tiles.Segment(latents, start)
        self.attend(q, segment, row.kv_len, row.up, row.scale, (out, out, out), out, lse)
        return out, lse


@dataclass(frozen=True)
class _Row:
    """What one row attends to: cache, its block table [M], its length on the device [1] and the host, projections."""

    kv_cache: Tensor
    table: Tensor
    kv_len: Tensor
    length: int
    up: tuple[Tensor, Tensor]
    scale: float


def _merged(parts: list[Part], count: int, out: Tensor | None = None) -> Part:
    """The first `count` queries of all parts together, in `out` if given. All have log-sum-exps of one width."""
    (first, lse), dependent = parts[0], is_hopper(parts[0][0].device)
    heads, value = first.shape[1:]
    out = torch.empty_like(first) if out is None else out
    total = torch.empty_like(lse)
    # One kernel for any number of parts: what stands for those that are none is not read.
    outs, lses = zip(*(parts + [parts[0]] * (PARTS - len(parts))), strict=True)
    _merge[triton.cdiv(count, TOKENS), heads](
        outs, lses, out, total, count, len(parts), lse.stride(0),
        HEADS=heads, V=value, PARTS=PARTS, TOKENS=TOKENS, DEPENDENT=dependent, num_warps=4,
        **dependent_launch(dependent),
    )  # fmt: skip
    return out, total


def bind(target: Target, traits: Traits) -> MlaPrefill:
    return MlaPrefill(target, traits)
