"""moe_experts of many tokens: tokens sorted by expert, torch's grouped products, weighted sum back.

From some hundred tokens on the products are bound by arithmetic, and CUTLASS's grouped product (`torch._grouped_mm`)
reaches 560 to 600 TFLOP/s on an H100 where the Triton version's tiles reach two thirds of that. It takes the rows of
one expert behind those of another, and on the device where each expert's rows end: no padding in between (only the
strides must be multiples of 16 bytes), and rows behind the last end are neither read nor written.

The sort is one of counting, in three launches: each block of pairs (token, slot) counts its experts and ranks its
pairs among those of the same expert; one program turns the counts into starts; every token is copied to the places of
its pairs. Nothing depends on the order in which programs run, so a step gives the same bits each time. Few tokens go
to the Triton version.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Target, Traits
from tokenspeed.kernels.triton import moe_experts as by_tiles
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents
from tokenspeed.kernels.triton.silu_mul import silu_mul

MANY = 512
"""Tokens from which the grouped products are used: with fewer, both versions take what reading the weights takes."""

PAIRS = 1024
"""Pairs (token, slot) that one program counts."""

ELEMENTS = 8192
"""Pairs × experts, or blocks of pairs × experts, that one program holds at a time."""


@triton.jit(do_not_specialize=["num_pairs"])
def _rank(
    ids, ranks, counts, num_pairs,
    E: tl.constexpr, EXPERTS: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """ranks[p]: how many pairs before p in its block have its expert; counts[block, e]: how many have e."""
    block = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    count = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, PAIRS, STEP):
        p = block * PAIRS + start + tl.arange(0, STEP)
        expert = tl.load(ids + p, mask=p < num_pairs, other=-1)
        match = (expert[:, None] == e[None, :]).to(tl.int32)
        before = count[None, :] + tl.cumsum(match, 0) - match
        tl.store(ranks + p, tl.sum(before * match, 1), mask=p < num_pairs)
        count += tl.sum(match, 0)
    tl.store(counts + block * E + e, count, mask=e < E)


@triton.jit(do_not_specialize=["num_blocks"])
def _starts(
    counts, starts, ends, num_blocks,
    E: tl.constexpr, EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """starts[block, e]: the place of the first pair of e in the block; ends[e]: the place behind the last one of e."""
    b = tl.arange(0, BLOCKS)
    e = tl.arange(0, EXPERTS)
    inside = e < E
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    total = tl.zeros([EXPERTS], tl.int32)
    for first in range(0, num_blocks, BLOCKS):
        there = (first + b < num_blocks)[:, None] & inside[None, :]
        total += tl.sum(tl.load(counts + (first + b)[:, None] * E + e[None, :], mask=there, other=0), 0)
    end = tl.cumsum(total, 0)
    tl.store(ends + e, end, mask=inside)
    reached = end - total
    for first in range(0, num_blocks, BLOCKS):
        at = (first + b)[:, None] * E + e[None, :]
        there = (first + b < num_blocks)[:, None] & inside[None, :]
        count = tl.load(counts + at, mask=there, other=0)
        tl.store(starts + at, reached[None, :] + tl.cumsum(count, 0) - count, mask=there)
        reached += tl.sum(count, 0)


@triton.jit
def _place(
    x, ids, ranks, starts, places, rows, x_stride,
    E: tl.constexpr, SLOTS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr, PAIRS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """rows[places[pair]] = x[token] for every pair of the token that has an expert."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    value = tl.load(x + token * x_stride + h, mask=h < HIDDEN, other=0.0)
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(ids + pair)
        if (expert >= 0) & (expert < E):  # what a token of NaN is given may be none that exists
            place = tl.load(starts + pair // PAIRS * E + expert) + tl.load(ranks + pair)
            tl.store(rows + place.to(tl.int64) * HIDDEN + h, value, mask=h < HIDDEN)
            if tl.program_id(1) == 0:
                tl.store(places + pair, place)


@triton.jit
def _gathered_sum(
    answers, ids, weights, places, out,
    E: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[token] = Σ weight · answers[place] over the token's slots that have an expert."""
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = tl.arange(0, PADDED)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    expert = tl.load(ids + token * SLOTS + slot, mask=slot < SLOTS, other=-1)
    live = (expert >= 0) & (expert < E)
    place = tl.load(places + token * SLOTS + slot, mask=live, other=0).to(tl.int64)
    weight = tl.load(weights + token * SLOTS + slot, mask=live, other=0.0)
    there = live[:, None] & (h < HIDDEN)[None, :]
    value = tl.load(answers + place[:, None] * HIDDEN + h[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * HIDDEN + h, tl.sum(value * weight[:, None], 0).to(out.dtype.element_ty), mask=h < HIDDEN)


class MoeExperts:
    """The op for one expert shape; see `ops.MoeExperts`. `many`: tokens from which the products are grouped."""

    def __init__(self, num_shared: int, many: int = MANY) -> None:
        self.many = many
        self._few = by_tiles.MoeExperts(num_shared)

    def __call__(self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, /) -> Tensor:
        if x.shape[0] < self.many:
            return self._few(x, gate_up, down, ids, weights)
        rows, places, ends = sorted_rows(x, ids, gate_up.shape[0])
        gate_and_up = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
        del rows  # a quarter of a gigabyte at 8,192 tokens: not beside what follows
        hidden = silu_mul(gate_and_up)
        del gate_and_up
        answers = torch._grouped_mm(hidden, down.transpose(1, 2), offs=ends)
        (tokens, size), slots, dependent = x.shape, ids.shape[1], is_hopper(x.device)
        out = torch.empty(tokens, size, dtype=x.dtype, device=x.device)
        block = min(triton.next_power_of_2(size), 1024)
        _gathered_sum[tokens, triton.cdiv(size, block)](
            answers, ids, weights, places, out, E=len(gate_up), SLOTS=slots, PADDED=triton.next_power_of_2(slots),
            HIDDEN=size, BLOCK_H=block, DEPENDENT=dependent, num_warps=4, **dependent_launch(dependent),
        )  # fmt: skip
        return out


def sorted_rows(x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T,H], ids [T,K] → (rows [T·K,H], places [T,K] int32, ends [E] int32): the rows of expert e are x of its tokens
    and end at ends[e]; token t's row for slot k is places[t,k], undefined where the id is −1, as are rows behind
    the last end."""
    (tokens, size), slots, device, num_pairs = x.shape, ids.shape[1], x.device, ids.numel()
    experts, dependent = triton.next_power_of_2(num_experts), is_hopper(x.device)
    step = max(1, min(PAIRS, ELEMENTS // experts))
    blocks, launch = triton.cdiv(num_pairs, PAIRS), dependent_launch(dependent)
    # Each in memory of its own: halves of one tensor would be aligned or not by the number of blocks.
    empty = partial(torch.empty, dtype=torch.int32, device=device)
    ranks, places, ends = empty(num_pairs), empty(tokens, slots), empty(num_experts)
    counts, starts = empty(blocks, num_experts), empty(blocks, num_experts)
    shape = {"E": num_experts, "EXPERTS": experts, "DEPENDENT": dependent}
    _rank[blocks,](ids, ranks, counts, num_pairs, PAIRS=PAIRS, STEP=step, num_warps=8, **shape, **launch)
    _starts[1,](counts, starts, ends, blocks, BLOCKS=min(64, step), num_warps=8, **shape, **launch)
    rows = torch.empty(num_pairs, size, dtype=x.dtype, device=device)
    block = min(triton.next_power_of_2(size), 2048)
    _place[tokens, triton.cdiv(size, block)](
        x, ids, ranks, starts, places, rows, x.stride(0), E=num_experts, SLOTS=slots, HIDDEN=size, BLOCK_H=block,
        PAIRS=PAIRS, DEPENDENT=dependent, num_warps=4, **launch,
    )  # fmt: skip
    return rows, places, ends


def bind(target: Target, traits: Traits) -> MoeExperts:
    return MoeExperts(int(traits["num_shared"]))
