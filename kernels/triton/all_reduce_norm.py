"""all_reduce_norm: r = Σ over ranks of x + residual; y = r / sqrt(mean(r²) + eps) · weight, over shared memory.

One program a token on every rank, and tokens do not wait for each other: a program says to its peers that its term of
the token is there, waits until theirs are, and sums them in the order of the ranks, so that all get the same bits.
`one shot`: every rank reads all terms. `two shots`: the token's owner does, and brings the sum to every rank: for n
ranks 2 (n − 1)/n instead of n − 1 times the message. Either way one wait for the slowest rank a shot, no barrier behind
(`Peers` says why halves suffice). Counts are kept on the device, so that a CUDA graph can be replayed.

The least token that is not done on all ranks is running on all of them, as programs start in order: nobody waits for
one that cannot start.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.peers import Peers
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents

ONE_SHOT_BYTES = 256 << 10
"""Of a message, up to which reading every term is faster than a second wait. Of two ranks it always is."""


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
    at = ((call % 2) * rows + wide) * HIDDEN + h
    own = tl.load(x + wide * x_stride + h, mask=inside, other=0.0)
    tl.store(terms[RANK] + at, own, mask=inside)
    before = tl.zeros(own.shape, tl.float32)
    if HAS_RESIDUAL:
        before += tl.load(residual + wide * residual_stride + h, mask=inside, other=0.0).to(tl.float32)
    _say(arrived, token * NUM + RANK, NUM, LANES)
    if TWO_SHOTS:
        again = tl.load(calls + rows + token) + 1
        at_sum = ((again % 2) * rows + wide) * HIDDEN + h
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
    r = (total + before).to(own.dtype)
    tl.store(residual_out + wide * HIDDEN + h, r, mask=inside)
    # The sum as it is stored, not as it was before rounding: what the next layer adds to is what was normed.
    r_wide = r.to(tl.float32)
    scale = tl.rsqrt(tl.sum(r_wide * r_wide, 0) / HIDDEN + eps)
    tl.store(y + wide * HIDDEN + h, (r_wide * scale * gain).to(y.dtype.element_ty), mask=inside)


def all_reduce_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, peers: Peers, /
) -> tuple[Tensor, Tensor]:
    num_bytes = x.shape[0] * x.shape[1] * x.element_size()
    return _launched(x, weight, eps, residual, peers, len(peers.terms) > 2 and num_bytes > ONE_SHOT_BYTES)


def _launched(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, peers: Peers, two_shots: bool
) -> tuple[Tensor, Tensor]:
    tokens, hidden = x.shape
    y, residual_out = (torch.empty(tokens, hidden, dtype=x.dtype, device=x.device) for _ in range(2))
    if tokens:
        block = triton.next_power_of_2(hidden)
        other, stride = (x, 0) if residual is None else (residual, residual.stride(0))
        dependent = is_hopper(x.device)
        _all_reduce_norm[tokens,](
            x, other, weight, y, residual_out, peers.terms, peers.sums, peers.arrived, peers.summed, peers.calls, eps,
            x.stride(0), stride, peers.max_rows,
            RANK=peers.rank, NUM=len(peers.terms), LANES=triton.next_power_of_2(len(peers.terms)), TWO_SHOTS=two_shots,
            HIDDEN=hidden, BLOCK=block, HAS_RESIDUAL=residual is not None, DEPENDENT=dependent,
            num_warps=max(1, min(16, block // 512)), **dependent_launch(dependent),
        )  # fmt: skip
    return y, residual_out


def bind(target: Target, traits: Traits) -> Kernel:
    return all_reduce_norm
