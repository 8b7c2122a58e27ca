"""all_reduce_norm: r = Σ over ranks of x + residual; y = r / sqrt(mean(r²) + eps) · weight, over shared memory.

One program a token on every rank, and tokens do not wait for each other: a program tells its peers its term of the
token, waits for theirs, and sums them in the order of the ranks, so that all get the same bits. Three forms, by size:
`push`: every rank writes its term to all others, in words of 32 bits of data and the number of the call; who finds this
in all words has the terms: one way once, no fence, but twice the bytes. `one shot`: every rank says that its term is
there, and reads all others. `two shots`: the token's owner does, and brings the sum to every rank: for n ranks
2 (n − 1)/n instead of n − 1 times the message. One wait for the slowest rank a push or shot, no barrier behind.

Why two halves of memory suffice, of words as of terms: a rank writes its row of call c + 2 when its call c + 1 has
ended, and that had the terms of c + 1 of all ranks, which they gave when their call c had ended: nobody reads call c
any more. A kernel that starts early (programmatic dependent launch) writes nothing before those ahead of it have ended.
So what a half has of a row is of call c or c − 2, or zero from the start. Counts are of rows, each form has its own,
and they are kept on the device, so that a CUDA graph can be replayed. After 2³² calls, days, they begin again at 0: as
good as any number, as only the sign of differences and the parity matter.

The least token that is not done on all ranks is running on all of them, as programs start in order: nobody waits for
one that cannot start.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.peers import PUSH, PUSH_BYTES, Peers
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents

ONE_SHOT_BYTES = 256 << 10
"""Of a message too large to push, up to which reading every term is faster than a second wait; of two ranks, always."""


@triton.jit
def _say(counts, at, NUM: tl.constexpr, LANES: tl.constexpr):
    """Count one up at `at` in the memory of every rank, at once, after all that this program has written."""
    tl.debug_barrier()
    lane = tl.arange(0, LANES)
    where = counts[0].to(tl.int64) + lane * 0
    for q in tl.static_range(1, NUM):
        where = tl.where(lane == q, counts[q].to(tl.int64), where)
    there = where.to(tl.pointer_type(tl.int32)) + at
    tl.atomic_add(there, lane * 0 + 1, mask=lane < NUM, sem="release", scope="sys")


@triton.jit
def _wait(counts, count, NUM: tl.constexpr, LANES: tl.constexpr):
    """Until NUM neighbouring counts in this rank's memory are `count` or, as peers may be ahead, more."""
    lane = tl.arange(0, LANES)
    inside = lane < NUM
    missing = tl.min(tl.where(inside, tl.full([LANES], -1, tl.int32), 0), 0)
    while missing < 0:
        seen = tl.atomic_add(counts + lane, lane * 0, mask=inside, sem="acquire", scope="sys")
        missing = tl.min(tl.where(inside, seen - count, 0), 0)
    tl.debug_barrier()


@triton.jit
def _reduced(own, terms, at, inside, RANK: tl.constexpr, NUM: tl.constexpr):
    total = tl.zeros(own.shape, tl.float32)
    for q in tl.static_range(NUM):
        if q == RANK:
            total += own.to(tl.float32)
        else:
            total += tl.load(terms[q] + at, mask=inside, other=0.0, volatile=True).to(tl.float32)
    return total


@triton.jit
def _packed(values, call, ITEMS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK · ITEMS] numbers → [BLOCK] words: ITEMS numbers, the first of them lowest, and the call above them."""
    if ITEMS == 2:
        first, second = tl.split(tl.reshape(values.to(tl.int16, bitcast=True), [BLOCK, 2]))
        data = (first.to(tl.int32) & 0xFFFF) | (second.to(tl.int32) << 16)
    else:
        data = values.to(tl.int32, bitcast=True)
    return (call.to(tl.int64) << 32) | (data.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def _unpacked(data, DTYPE: tl.constexpr, ITEMS: tl.constexpr, BLOCK: tl.constexpr):
    """The low halves of words, int32 [BLOCK] → their numbers [BLOCK · ITEMS]."""
    if ITEMS == 2:
        first, second = data.to(tl.int16), (data >> 16).to(tl.int16)
        numbers = tl.reshape(tl.join(first, second), [BLOCK * 2])
    else:
        numbers = data
    return numbers.to(DTYPE, bitcast=True)


@triton.jit
def _missing(seen, there, call):
    """Whether a word that is `there` is of a call before this."""
    return tl.max(tl.max(tl.where(there & ((seen >> 32).to(tl.int32) - call < 0), 1, 0), 0), 0) > 0


@triton.jit
def _received(words, there, call):
    """The low halves of words [LANES, BLOCK] in this rank's memory, when all that are `there` are of this call."""
    seen = tl.load(words, mask=there, other=0, volatile=True)
    while _missing(seen, there, call):
        seen = tl.load(words, mask=there, other=0, volatile=True)
    return seen.to(tl.int32)


@triton.jit
def _write(total, before, gain, y, residual_out, at, inside, eps, HIDDEN: tl.constexpr, DTYPE: tl.constexpr):
    r = (total + before).to(DTYPE)
    tl.store(residual_out + at, r, mask=inside)
    # The sum as it is stored, not as it was before rounding: what the next layer adds to is what was normed.
    r_wide = r.to(tl.float32)
    scale = tl.rsqrt(tl.sum(r_wide * r_wide, 0) / HIDDEN + eps)
    tl.store(y + at, (r_wide * scale * gain).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _push_norm(
    x, residual, weight, y, residual_out, words, calls, eps, x_stride, residual_stride, rows,
    RANK: tl.constexpr, NUM: tl.constexpr, LANES: tl.constexpr, ITEMS: tl.constexpr,
    HIDDEN: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    wide = token.to(tl.int64)
    h = tl.arange(0, BLOCK * ITEMS)
    inside = h < HIDDEN
    w = tl.arange(0, BLOCK)
    peer = tl.arange(0, LANES)
    from_rank = peer + (peer >= RANK).to(tl.int32)
    there = (peer < NUM - 1)[:, None] & (w < WORDS)[None, :]
    release_dependents(DEPENDENT)
    gain = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    dependency_wait(DEPENDENT)
    call = tl.load(calls + token) + 1
    own = tl.load(x + wide * x_stride + h, mask=inside, other=0.0)
    row = ((call & 1) * rows + wide) * NUM
    packed = _packed(own, call, ITEMS, BLOCK)
    for q in tl.static_range(NUM):
        if q != RANK:
            tl.store(words[q] + (row + RANK) * WORDS + w, packed, mask=w < WORDS, cache_modifier=".wt")
    before = tl.zeros(own.shape, tl.float32)
    if HAS_RESIDUAL:
        before += tl.load(residual + wide * residual_stride + h, mask=inside, other=0.0).to(tl.float32)
    data = _received(words[RANK] + ((row + from_rank) * WORDS)[:, None] + w[None, :], there, call)
    tl.debug_barrier()  # All warps have read the count.
    tl.store(calls + token, call)
    total = tl.zeros(own.shape, tl.float32)
    for q in tl.static_range(NUM):
        if q == RANK:
            total += own.to(tl.float32)
        else:
            theirs = tl.sum(tl.where((from_rank == q)[:, None], data, 0), 0)
            total += _unpacked(theirs, own.dtype, ITEMS, BLOCK).to(tl.float32)
    _write(total, before, gain, y, residual_out, wide * HIDDEN + h, inside, eps, HIDDEN, own.dtype)


@triton.jit
def _all_reduce_norm(
    x, residual, weight, y, residual_out, terms, sums, arrived, summed, calls, eps, x_stride, residual_stride, rows,
    RANK: tl.constexpr, NUM: tl.constexpr, LANES: tl.constexpr, TWO_SHOTS: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    wide = token.to(tl.int64)
    h = tl.arange(0, BLOCK)
    inside = h < HIDDEN
    release_dependents(DEPENDENT)
    gain = tl.load(weight + h, mask=inside, other=0.0).to(tl.float32)
    dependency_wait(DEPENDENT)
    call = tl.load(calls + token) + 1
    at = ((call & 1) * rows + wide) * HIDDEN + h
    own = tl.load(x + wide * x_stride + h, mask=inside, other=0.0)
    tl.store(terms[RANK] + at, own, mask=inside)
    before = tl.zeros(own.shape, tl.float32)
    if HAS_RESIDUAL:
        before += tl.load(residual + wide * residual_stride + h, mask=inside, other=0.0).to(tl.float32)
    _say(arrived, token * NUM + RANK, NUM, LANES)
    if TWO_SHOTS:
        again = tl.load(calls + rows + token) + 1
        at_sum = ((again & 1) * rows + wide) * HIDDEN + h
        if token % NUM == RANK:
            _wait(arrived[RANK] + token * NUM, call, NUM, LANES)
            brought = _reduced(own, terms, at, inside, RANK, NUM).to(own.dtype)
            for q in tl.static_range(NUM):
                tl.store(sums[q] + at_sum, brought, mask=inside)
            _say(summed, token, NUM, LANES)
        _wait(summed[RANK] + token, again, 1, LANES)
        total = tl.load(sums[RANK] + at_sum, mask=inside, other=0.0, volatile=True).to(tl.float32)
        tl.store(calls + rows + token, again)
    else:
        _wait(arrived[RANK] + token * NUM, call, NUM, LANES)
        total = _reduced(own, terms, at, inside, RANK, NUM)
    tl.store(calls + token, call)
    _write(total, before, gain, y, residual_out, wide * HIDDEN + h, inside, eps, HIDDEN, own.dtype)


class Form(enum.Enum):
    PUSH = enum.auto()
    ONE_SHOT = enum.auto()
    TWO_SHOTS = enum.auto()


def form_of(x: Tensor, num_ranks: int) -> Form:
    """Of numbers that are the same on every rank, as their forms must be."""
    num_bytes = x.shape[0] * x.shape[1] * x.element_size()
    if num_bytes <= PUSH_BYTES:
        return Form.PUSH
    return Form.ONE_SHOT if num_ranks == 2 or num_bytes <= ONE_SHOT_BYTES else Form.TWO_SHOTS


def push_sizes(num_words: int, num_ranks: int) -> dict[str, int]:
    """Two words a thread as far as there are threads: 16 bytes at once, and numbers and words of a row in the same
    threads. At least two: a word in two threads might be seen by one of them only."""
    block = max(64, triton.next_power_of_2(num_words))
    return {"LANES": triton.next_power_of_2(num_ranks - 1), "BLOCK": block, "num_warps": min(32, block // 64)}


def all_reduce_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, peers: Peers, /
) -> tuple[Tensor, Tensor]:
    return launched(x, weight, eps, residual, peers, form_of(x, len(peers.terms)))


def launched(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, peers: Peers, form: Form
) -> tuple[Tensor, Tensor]:
    """All ranks ask for the same form. To push, x has no more rows than `peers.words`."""
    tokens, hidden = x.shape
    y, residual_out = (torch.empty(tokens, hidden, dtype=x.dtype, device=x.device) for _ in range(2))
    if not tokens:
        return y, residual_out
    num_ranks = len(peers.terms)
    other, stride = (x, 0) if residual is None else (residual, residual.stride(0))
    dependent = is_hopper(x.device)
    options: dict[str, Any] = {
        "RANK": peers.rank, "NUM": num_ranks, "HIDDEN": hidden, "HAS_RESIDUAL": residual is not None,
        "DEPENDENT": dependent, **dependent_launch(dependent),
    }  # fmt: skip
    if form is Form.PUSH:
        _, rows, _, num_words = peers.words[peers.rank].shape
        _push_norm[tokens,](
            x, other, weight, y, residual_out, peers.words, peers.calls[PUSH], eps, x.stride(0), stride, rows,
            ITEMS=4 // x.element_size(), WORDS=num_words, **push_sizes(num_words, num_ranks), **options,
        )  # fmt: skip
    else:
        block = triton.next_power_of_2(hidden)
        _all_reduce_norm[tokens,](
            x, other, weight, y, residual_out, peers.terms, peers.sums, peers.arrived, peers.summed, peers.calls, eps,
            x.stride(0), stride, peers.max_rows,
            LANES=triton.next_power_of_2(num_ranks), TWO_SHOTS=form is Form.TWO_SHOTS, BLOCK=block,
            num_warps=max(1, min(16, block // 512)), **options,
        )  # fmt: skip
    return y, residual_out


def bind(target: Target, traits: Traits) -> Kernel:
    return all_reduce_norm
