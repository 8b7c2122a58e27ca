"""sample: many programs a row read its logits once, and one takes the token from what they found; see `ops.Sample`.

One program alone would take 41 µs to walk over 128,256 logits three times. A row with temperature alone draws among
the chunks by their mass, and then within one. Only a row with min_p, top_k or top_p walks over its logits again, and
searches for its cut: two bits a turn of the float32 number that is the least probability kept, by how much lies
at or above it (positive floats order as their bits do).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels import sampler_state
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.sampler_state import SamplerState
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents

RANDOM = tl.constexpr(sampler_state.RANDOM)
SORTED_CUT = tl.constexpr(sampler_state.SORTED_CUT)
EDITS = tl.constexpr(sampler_state.EDITS)
HISTORY = tl.constexpr(sampler_state.HISTORY)
MASKED = tl.constexpr(sampler_state.MASKED)
PROMPT = tl.constexpr(sampler_state.PROMPT)
STOP = tl.constexpr(sampler_state.STOP)
COUNT = tl.constexpr(sampler_state.COUNT)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _uniform(seed, position):
    state = _mix(seed.to(tl.uint64)) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    return (_mix(state) >> 11).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _edited(x, i, inside, slot, bias, seen, repetition, presence, frequency, waits, V: tl.constexpr):
    """Bias, penalties and masks of one tile."""
    known = tl.load(seen + slot * V + i, mask=inside, other=0)
    count = (known & COUNT).to(tl.float32)
    x += tl.load(bias + slot * V + i, mask=inside, other=0.0)
    repeated = tl.where(x > 0, x / repetition, x * repetition)
    x = tl.where((count > 0) | (known & PROMPT != 0), repeated, x)
    x = x - frequency * count - presence * (count > 0).to(tl.float32)
    return tl.where((known & STOP != 0) & waits, float("-inf"), x)


@triton.jit
def _held(p, first, second, third, V: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr):
    """How many of p [V] are at least each of three numbers > 0 (COUNTED), or else their sums, as float64."""
    lane = tl.arange(0, BLOCK)
    one = tl.zeros([BLOCK], tl.float32)
    two = tl.zeros([BLOCK], tl.float32)
    three = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK, loop_unroll_factor=2):
        value = tl.load(p + start + lane, mask=start + lane < V, other=-1.0)
        weight = tl.where(value >= 0.0, 1.0, 0.0) if COUNTED else value
        one += tl.where(value >= first, weight, 0.0)
        two += tl.where(value >= second, weight, 0.0)
        three += tl.where(value >= third, weight, 0.0)
    return tl.sum(one.to(tl.float64), 0), tl.sum(two.to(tl.float64), 0), tl.sum(three.to(tl.float64), 0)


@triton.jit
def _least(p, floor, wanted, V: tl.constexpr, BLOCK: tl.constexpr, COUNTED: tl.constexpr):
    """The largest number, and at least `floor`, at or above which p [V], whose largest is 1, holds `wanted`."""
    bits = tl.full([], 0, tl.int32)
    for turn in range(15):
        unit = 1 << (28 - 2 * turn)
        first = tl.maximum(floor, (bits + unit).to(tl.float32, bitcast=True))
        second = tl.maximum(floor, (bits + 2 * unit).to(tl.float32, bitcast=True))
        third = tl.maximum(floor, (bits + 3 * unit).to(tl.float32, bitcast=True))
        one, two, three = _held(p, first, second, third, V, BLOCK, COUNTED)
        bits += unit * ((one >= wanted).to(tl.int32) + (two >= wanted).to(tl.int32) + (three >= wanted).to(tl.int32))
    return tl.maximum(floor, bits.to(tl.float32, bitcast=True))


@triton.jit
def _draw(p, cut, target, V: tl.constexpr, BLOCK: tl.constexpr):
    """The first token whose cumulative mass, of what is at least `cut`, exceeds `target`; else the last with any."""
    lane = tl.arange(0, BLOCK)
    before = tl.full([], 0, tl.float64)
    mass = tl.full([], 0, tl.float64)
    at = tl.full([], 0, tl.int32)
    searching = tl.full([], 1, tl.int32)
    for start in range(0, V, BLOCK):
        value = tl.load(p + start + lane, mask=start + lane < V, other=0.0)
        tile = tl.sum(tl.where(value >= cut, value, 0.0).to(tl.float64), 0)
        taken = (searching != 0) & (tile > 0)
        before = tl.where(taken, mass, before)
        at = tl.where(taken, start, at)
        mass += tile
        searching = tl.where(mass > target, 0, searching)
    value = tl.load(p + at + lane, mask=at + lane < V, other=0.0)
    value = tl.where(value >= cut, value, 0.0)
    reached = before + tl.cumsum(value.to(tl.float64), 0) > target
    first = tl.min(tl.where(reached & (value > 0), lane, BLOCK), 0)
    last = tl.max(tl.where(value > 0, lane, 0), 0)
    return at + tl.minimum(first, last)


@triton.jit
def _drawn(
    x_row, top, slot, features, length, temperature_, top_k_, top_p_, min_p_, seed_,
    V: tl.constexpr, BLOCK: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    """The token of one row of logits, the largest of them `top`; they become probabilities relative to it."""
    lane = tl.arange(0, BLOCK)
    temperature = tl.load(temperature_ + slot)
    cut = tl.load(min_p_ + slot)
    total = tl.zeros([BLOCK], tl.float32)
    # What another thread of this program stored is read from here on.
    tl.debug_barrier()
    for start in tl.range(0, V, BLOCK, loop_unroll_factor=2):
        i = start + lane
        x = tl.load(x_row + i, mask=i < V, other=float("-inf"))
        p = tl.exp((x - top) / temperature)
        total += tl.where(p >= cut, p, 0.0)
        tl.store(x_row + i, p, mask=i < V)
    mass = tl.sum(total.to(tl.float64), 0)
    tl.debug_barrier()
    if features & SORTED_CUT != 0:
        top_k = tl.load(top_k_ + slot)
        top_p = tl.load(top_p_ + slot)
        if top_k > 0:
            count, _, _ = _held(x_row, tl.maximum(cut, 1e-45), 2.0, 2.0, V, BLOCK, True)
            cut = _least(x_row, cut, tl.minimum(top_k.to(tl.float64), count), V, BLOCK, True)
        mass, _, _ = _held(x_row, cut, 2.0, 2.0, V, BLOCK, False)
        if top_p < 1.0:
            cut = _least(x_row, cut, top_p.to(tl.float64) * mass, V, BLOCK, False)
            mass, _, _ = _held(x_row, cut, 2.0, 2.0, V, BLOCK, False)
    number = _uniform(tl.load(seed_ + slot), length)
    return _draw(x_row, cut, number * mass, V, WALK)


@triton.jit
def _drawn_in_chunk(x_row, top, temperature, at, target, V: tl.constexpr, CHUNK: tl.constexpr):
    """The first token from `at` on whose cumulative mass exceeds `target`; else the last one of the chunk with any."""
    lane = tl.arange(0, CHUNK)
    x = tl.load(x_row + at + lane, mask=at + lane < V, other=float("-inf"))
    p = tl.exp((x - top) / temperature)
    reached = tl.cumsum(p.to(tl.float64), 0) > target
    first = tl.min(tl.where(reached & (p > 0), lane, CHUNK), 0)
    last = tl.max(tl.where(p > 0, lane, 0), 0)
    return at + tl.minimum(first, last)


@triton.jit
def _scan(
    logits, slots, peaks, masses, places, features_, temperature_, repetition_, presence_, frequency_, min_length_,
    length_, bias, seen, mask,
    V: tl.constexpr, CHUNK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Edit a chunk of a row's logits, and leave its largest, the mass relative to that, and where it stands first;
    −1 if one of them is no number that may be sampled from."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = i < V
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        features = tl.load(features_ + slot)
        source = logits + row.to(tl.int64) * V + i
        x = tl.load(source, mask=inside, other=float("-inf"))
        bad = tl.max(((x != x) | (x == float("inf"))).to(tl.int32), 0)  # noqa: PLR0124 - NaN
        if features & EDITS != 0:
            waits = tl.load(length_ + slot) < tl.load(min_length_ + slot)
            repetition = tl.load(repetition_ + slot)
            presence = tl.load(presence_ + slot)
            frequency = tl.load(frequency_ + slot)
            x = _edited(x, i, inside, slot, bias, seen, repetition, presence, frequency, waits, V)
        if features & MASKED != 0:
            words = tl.load(mask + slot * ((V + 31) // 32) + i // 32, mask=inside, other=0)
            x = tl.where((words >> (i % 32)) & 1 != 0, x, float("-inf"))
        if features & (EDITS | MASKED) != 0:
            tl.store(source, x, mask=inside)
        peak = tl.max(x, 0)
        place = tl.min(tl.where(x == peak, i, V), 0)
        shift = tl.where(peak == float("-inf"), 0.0, peak)
        mass = tl.sum(tl.exp((x - shift) / tl.load(temperature_ + slot)), 0)
        to = row * tl.num_programs(1) + chunk
        tl.store(peaks + to, peak)
        tl.store(masses + to, mass)
        tl.store(places + to, tl.where(bad != 0, -1, place))


@triton.jit
def _choose(
    logits, slots, tokens, peaks, masses, places, features_, temperature_, top_k_, top_p_, min_p_, seed_, length_,
    last_token_, seen,
    V: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    WALK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The token of a row, from what its chunks left."""
    row = tl.program_id(0)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        tl.store(tokens + row, -1)
    else:
        c = tl.arange(0, PADDED)
        at = row * CHUNKS + c
        peak = tl.load(peaks + at, mask=c < CHUNKS, other=float("-inf"))
        place = tl.load(places + at, mask=c < CHUNKS, other=V)
        features = tl.load(features_ + slot)
        top = tl.max(peak, 0)
        usable = (tl.min(place, 0) >= 0) & (top > float("-inf"))
        token = tl.min(tl.where(peak == top, place, V), 0)
        if usable & (features & RANDOM != 0):
            x_row = logits + row.to(tl.int64) * V
            length = tl.load(length_ + slot)
            temperature = tl.load(temperature_ + slot)
            if (features & SORTED_CUT == 0) & (tl.load(min_p_ + slot) == 0.0):
                mass = tl.load(masses + at, mask=c < CHUNKS, other=0.0).to(tl.float64)
                mass *= tl.exp((peak - top) / temperature).to(tl.float64)
                until = tl.cumsum(mass, 0)
                target = _uniform(tl.load(seed_ + slot), length) * tl.sum(mass, 0)
                first = tl.min(tl.where((until > target) & (mass > 0), c, PADDED), 0)
                first = tl.minimum(first, tl.max(tl.where(mass > 0, c, 0), 0))
                before = tl.sum(tl.where(c < first, mass, 0.0), 0)
                token = _drawn_in_chunk(x_row, top, temperature, first * CHUNK, target - before, V, CHUNK)
            else:
                token = _drawn(
                    x_row, top, slot, features, length, temperature_, top_k_, top_p_, min_p_, seed_, V, BLOCK, WALK
                )
        token = tl.where(usable, token, -1)
        tl.store(tokens + row, token)
        tl.store(last_token_ + slot, tl.maximum(token, 0).to(tl.int64))
        if usable & (features & HISTORY != 0):
            counted = seen + slot * V + token
            tl.store(counted, tl.load(counted) + 1)


class Sample:
    """The op; see `ops.Sample`. `chunk`: logits a program of the first kernel."""

    def __init__(self, chunk: int = 4096) -> None:
        self.chunk = chunk

    def __call__(self, logits: Tensor, slots: Tensor, state: SamplerState, /) -> Tensor:
        (rows, vocab), device = logits.shape, logits.device
        tokens = torch.empty(rows, dtype=torch.int32, device=device)
        if rows:
            size = triton.next_power_of_2(vocab)
            chunk, block = min(size, self.chunk), min(size, 8192)
            chunks = triton.cdiv(vocab, chunk)
            peaks, masses = torch.empty(2, rows, chunks, dtype=torch.float32, device=device)
            places = torch.empty(rows, chunks, dtype=torch.int32, device=device)
            dependent = is_hopper(device)
            _scan[rows, chunks](
                logits, slots, peaks, masses, places, state.features, state.temperature, state.repetition,
                state.presence, state.frequency, state.min_length, state.length, state.bias, state.seen,
                state.mask, V=vocab, CHUNK=chunk, DEPENDENT=dependent, num_warps=8, **dependent_launch(dependent),
            )  # fmt: skip
            _choose[rows,](
                logits, slots, tokens, peaks, masses, places, state.features, state.temperature, state.top_k,
                state.top_p, state.min_p, state.seed, state.length, state.last_token, state.seen,
                V=vocab, CHUNK=chunk, CHUNKS=chunks, PADDED=triton.next_power_of_2(chunks), BLOCK=block,
                WALK=min(size, 16384), DEPENDENT=dependent, num_warps=max(4, block // 256),
                **dependent_launch(dependent),
            )  # fmt: skip
        return tokens


def bind(target: Target, traits: Traits) -> Kernel:
    return Sample()
