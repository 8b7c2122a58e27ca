"""moe_experts: y = Σ w · down_e · (silu(gate_e · x) · (up_e · x)), two ways.

Few tokens: one program reads some weight rows of one expert for one token with plain vector products, so
that exactly the experts used are read, at the rate of memory. More tokens: an expert's tokens are listed
on the device, and a program multiplies 64 weight rows (32 where experts were cut to a width that 64 does
not divide) with a tile of them on the tensor cores, the operands swapped (weights · xᵀ) since 64 rows
fill a tile where 16 tokens would not. Sizes that the host
does not know (tokens of an expert) are loops on the device; a slot of id −1 reads and adds nothing.

The last `num_shared` slots of a token hold the last `num_shared` experts: their weights are requested
before the wait for the kernel before, and their tokens need no list.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tokenspeed.kernels.registry import Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, is_hopper, release_dependents, shared_memory


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _up_rows(
    x, gate_up, ids, hidden, x_stride,
    E: tl.constexpr, SLOTS: tl.constexpr, NUM_SHARED: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1) // SLOTS
    slot = SLOTS - 1 - tl.program_id(1) % SLOTS
    pair = token * SLOTS + slot
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    k = tl.arange(0, BLOCK_K)
    at = i[:, None] * HIDDEN + k[None, :]
    if slot >= SLOTS - NUM_SHARED:
        rows = gate_up + tl.cast(E - SLOTS + slot, tl.int64) * (2 * INNER * HIDDEN)
        gate_weight = tl.load(rows + at)
        up_weight = tl.load(rows + INNER * HIDDEN + at)
        dependency_wait(DEPENDENT)
        expert = tl.load(ids + pair)
    else:
        dependency_wait(DEPENDENT)
        expert = tl.load(ids + pair)
        rows = gate_up + expert.to(tl.int64) * (2 * INNER * HIDDEN)
        live = tl.full([1, 1], 1, tl.int1) & (expert >= 0)
        gate_weight = tl.load(rows + at, mask=live, other=0.0)
        up_weight = tl.load(rows + INNER * HIDDEN + at, mask=live, other=0.0)
    # After our own wait: the dependents may then read the ids before theirs.
    release_dependents(DEPENDENT)
    if expert >= 0:
        xs = tl.load(x + token * x_stride + k).to(tl.float32)
        gate = tl.sum(gate_weight.to(tl.float32) * xs[None, :], 1)
        up = tl.sum(up_weight.to(tl.float32) * xs[None, :], 1)
        for start in tl.static_range(BLOCK_K, HIDDEN, BLOCK_K):
            xs = tl.load(x + token * x_stride + start + k).to(tl.float32)
            gate += tl.sum(tl.load(rows + start + at).to(tl.float32) * xs[None, :], 1)
            up += tl.sum(tl.load(rows + INNER * HIDDEN + start + at).to(tl.float32) * xs[None, :], 1)
        tl.store(hidden + pair * INNER + i, (_silu(gate) * up).to(hidden.dtype.element_ty))


@triton.jit
def _down_rows(
    hidden, down, ids, weights, out,
    SLOTS: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_I: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    i = tl.arange(0, BLOCK_I)
    slot = tl.arange(0, PADDED)
    release_dependents(DEPENDENT)
    # The kernel before waits before it releases this one, so the routing is there already.
    expert = tl.load(ids + token * SLOTS + slot, mask=slot < SLOTS, other=-1)
    weight = tl.load(weights + token * SLOTS + slot, mask=slot < SLOTS, other=0.0)
    live = expert >= 0
    rows = down + expert.to(tl.int64)[:, None, None] * (HIDDEN * INNER) + h[None, :, None] * INNER + i[None, None, :]
    tiles = ()
    for start in tl.static_range(0, INNER, BLOCK_I):
        tiles = tiles + (tl.load(rows + start, mask=live[:, None, None], other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    dependency_wait(DEPENDENT)
    acc = tl.zeros([PADDED, BLOCK_H], tl.float32)
    for start in tl.static_range(0, INNER, BLOCK_I):
        at = (token * SLOTS + slot)[:, None] * INNER + start + i[None, :]
        value = tl.load(hidden + at, mask=live[:, None], other=0.0).to(tl.float32)
        acc += tl.sum(tiles[start // BLOCK_I].to(tl.float32) * value[:, None, :], 2)
    y = tl.sum(acc * weight[:, None], 0)
    tl.store(out + token * HIDDEN + h, y.to(out.dtype.element_ty))


@triton.jit(do_not_specialize=["num_pairs", "capacity"])
def _list_tokens(
    ids, pairs, counts, num_pairs, capacity, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):  # fmt: skip
    expert = tl.program_id(0)
    p = tl.arange(0, BLOCK)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    count = expert * 0
    for start in range(0, num_pairs, BLOCK):
        match = tl.load(ids + start + p, mask=start + p < num_pairs, other=-1) == expert
        rank = count + tl.cumsum(match.to(tl.int32), 0) - 1
        tl.store(pairs + expert * capacity + rank, start + p, mask=match)
        count += tl.sum(match.to(tl.int32), 0)
    tl.store(counts + expert, count)


@triton.jit
def _weight_tile(pointer, tma, row, k, WIDTH: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        return tma.load([row, k])
    at = (row + tl.arange(0, ROWS)).to(tl.int64)
    return tl.load(pointer + at[:, None] * WIDTH + k + tl.arange(0, K)[None, :])


@triton.jit
def _up_tile(
    x, gate_up, gate_up_tma, hidden, expert, pair, live, i0, x_stride,
    SLOTS: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """hidden[pair, i0 : i0 + BLOCK_I] of one expert for a tile of its tokens."""
    gate = tl.zeros([BLOCK_I, TOKENS], tl.float32)
    up = tl.zeros([BLOCK_I, TOKENS], tl.float32)
    source = x + (pair // SLOTS)[:, None] * x_stride + tl.arange(0, BLOCK_K)[None, :]
    row = expert * (2 * INNER) + i0
    for k in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
        tokens = tl.trans(tl.load(source + k))
        gate = tl.dot(_weight_tile(gate_up, gate_up_tma, row, k, HIDDEN, BLOCK_I, BLOCK_K, TMA), tokens, gate)
        up = tl.dot(_weight_tile(gate_up, gate_up_tma, row + INNER, k, HIDDEN, BLOCK_I, BLOCK_K, TMA), tokens, up)
    to = hidden + pair.to(tl.int64)[None, :] * INNER + (i0 + tl.arange(0, BLOCK_I))[:, None]
    tl.store(to, (_silu(gate) * up).to(hidden.dtype.element_ty), mask=live[None, :])


@triton.jit
def _down_tile(
    hidden, down, down_tma, weights, partial, expert, pair, live, h0,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial[pair, h0 : h0 + BLOCK_H] = weight · down_e · hidden for a tile of the expert's tokens."""
    acc = tl.zeros([BLOCK_H, TOKENS], tl.float32)
    source = hidden + pair.to(tl.int64)[:, None] * INNER + tl.arange(0, BLOCK_K)[None, :]
    for k in tl.range(0, INNER, BLOCK_K, num_stages=STAGES):
        tokens = tl.trans(tl.load(source + k))
        acc = tl.dot(_weight_tile(down, down_tma, expert * HIDDEN + h0, k, INNER, BLOCK_H, BLOCK_K, TMA), tokens, acc)
    acc *= tl.load(weights + pair)[None, :]
    to = partial + pair.to(tl.int64)[None, :] * HIDDEN + (h0 + tl.arange(0, BLOCK_H))[:, None]
    tl.store(to, acc.to(partial.dtype.element_ty), mask=live[None, :])


@triton.jit
def _shared_pairs(ids, index, tile, num_tokens, SLOTS: tl.constexpr, NUM_SHARED: tl.constexpr, TOKENS: tl.constexpr):
    """The pairs of shared expert `index` in a tile of consecutive tokens, and which of them are no padding."""
    token = tile * TOKENS + tl.arange(0, TOKENS)
    pair = tl.where(token < num_tokens, token, 0) * SLOTS + (SLOTS - NUM_SHARED) + index
    return pair, (token < num_tokens) & (tl.load(ids + pair) >= 0)


@triton.jit(do_not_specialize=["num_tokens"])
def _up_grouped(
    x, gate_up, gate_up_tma, ids, pairs, counts, hidden, num_tokens, x_stride,
    E: tl.constexpr, SLOTS: tl.constexpr, NUM_SHARED: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = INNER // BLOCK_I
    unit = tl.program_id(0) // BLOCKS
    i0 = tl.program_id(0) % BLOCKS * BLOCK_I
    tiles = (num_tokens + TOKENS - 1) // TOKENS
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    if unit < NUM_SHARED * tiles:
        index = unit // tiles
        pair, live = _shared_pairs(ids, index, unit % tiles, num_tokens, SLOTS, NUM_SHARED, TOKENS)
        _up_tile(
            x, gate_up, gate_up_tma, hidden, E - NUM_SHARED + index, pair, live, i0, x_stride,
            SLOTS, HIDDEN, INNER, TOKENS, BLOCK_I, BLOCK_K, TMA, STAGES,
        )  # fmt: skip
    else:
        expert = unit - NUM_SHARED * tiles
        count = tl.load(counts + expert)
        for start in range(0, count, TOKENS):
            j = start + tl.arange(0, TOKENS)
            pair = tl.load(pairs + expert * num_tokens + j, mask=j < count, other=0)
            _up_tile(
                x, gate_up, gate_up_tma, hidden, expert, pair, j < count, i0, x_stride,
                SLOTS, HIDDEN, INNER, TOKENS, BLOCK_I, BLOCK_K, TMA, STAGES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _down_grouped(
    hidden, down, down_tma, ids, weights, pairs, counts, partial, num_tokens,
    E: tl.constexpr, SLOTS: tl.constexpr, NUM_SHARED: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = HIDDEN // BLOCK_H
    unit = tl.program_id(0) // BLOCKS
    h0 = tl.program_id(0) % BLOCKS * BLOCK_H
    tiles = (num_tokens + TOKENS - 1) // TOKENS
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    if unit < NUM_SHARED * tiles:
        index = unit // tiles
        pair, live = _shared_pairs(ids, index, unit % tiles, num_tokens, SLOTS, NUM_SHARED, TOKENS)
        _down_tile(
            hidden, down, down_tma, weights, partial, E - NUM_SHARED + index, pair, live, h0,
            HIDDEN, INNER, TOKENS, BLOCK_H, BLOCK_K, TMA, STAGES,
        )  # fmt: skip
    else:
        expert = unit - NUM_SHARED * tiles
        count = tl.load(counts + expert)
        for start in range(0, count, TOKENS):
            j = start + tl.arange(0, TOKENS)
            pair = tl.load(pairs + expert * num_tokens + j, mask=j < count, other=0)
            _down_tile(
                hidden, down, down_tma, weights, partial, expert, pair, j < count, h0,
                HIDDEN, INNER, TOKENS, BLOCK_H, BLOCK_K, TMA, STAGES,
            )  # fmt: skip


@triton.jit
def _sum_slots(
    partial, ids, out,
    SLOTS: tl.constexpr, PADDED: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    slot = tl.arange(0, PADDED)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    live = tl.load(ids + token * SLOTS + slot, mask=slot < SLOTS, other=-1) >= 0
    at = (token.to(tl.int64) * SLOTS + slot)[:, None] * HIDDEN + h[None, :]
    value = tl.load(partial + at, mask=live[:, None], other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * HIDDEN + h, tl.sum(value, 0).to(out.dtype.element_ty))


DOWN_TILES = {16: (128, 4, 4), 32: (128, 4, 4)}
"""(weight rows a program, warps, stages) of the grouped down projection by its tile of tokens. With 64 rows
V2L's experts took 4% longer at 8 and 32 tokens on an H200, 6% at 128."""


@dataclass(frozen=True)
class Config:
    """What may be tuned: up to how many tokens vector products are used, and their rows a program; (weight rows a
    program, warps, stages) of the grouped down projection."""

    rows_up_to: int = 1
    up_rows: int = 4
    down_rows: int = 2
    down_tile: tuple[int, int, int] | None = None
    tma: bool = True
    dependent: bool = True


class MoeExperts:
    """The op for one expert shape; see `ops.MoeExperts`."""

    def __init__(self, num_shared: int, config: Config | None = None) -> None:
        self.num_shared = num_shared
        self.config = config

    def __call__(self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, /) -> Tensor:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.shape[0] == 0:
            return out
        hopper = is_hopper(x.device)
        config = self.config or Config(tma=hopper, dependent=hopper)
        few = x.shape[0] <= config.rows_up_to
        (self._by_rows if few else self._grouped)(config, x, gate_up, down, ids, weights, out)
        return out

    def _by_rows(
        self, config: Config, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        (tokens, size), slots = x.shape, ids.shape[1]
        num_experts, _, inner = down.shape
        hidden = torch.empty(tokens * slots, inner, dtype=x.dtype, device=x.device)
        launch = _launch(config)
        _up_rows[inner // config.up_rows, tokens * slots](
            x, gate_up, ids, hidden, x.stride(0),
            E=num_experts, SLOTS=slots, NUM_SHARED=self.num_shared, HIDDEN=size, INNER=inner, BLOCK_I=config.up_rows,
            BLOCK_K=_power_of_2_in(size, 2048), DEPENDENT=config.dependent, num_warps=4, **launch,
        )  # fmt: skip
        padded = triton.next_power_of_2(slots)
        _down_rows[size // config.down_rows, tokens](
            hidden, down, ids, weights, out,
            SLOTS=slots, PADDED=padded, HIDDEN=size, INNER=inner, BLOCK_H=config.down_rows,
            BLOCK_I=_power_of_2_in(inner, 512), DEPENDENT=config.dependent,
            num_warps=4 if padded * config.down_rows * inner <= 24_576 else 8, **launch,
        )  # fmt: skip

    def _grouped(
        self, config: Config, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        (tokens, size), slots, device = x.shape, ids.shape[1], x.device
        num_experts, _, inner = down.shape
        num_routed = num_experts - self.num_shared
        # Mean and two standard deviations of an expert's tokens: most experts take one turn.
        mean = tokens * (slots - self.num_shared) / num_routed
        tile = max(16, min(128, triton.next_power_of_2(math.ceil(mean + 2 * mean**0.5))))
        units = num_routed + self.num_shared * triton.cdiv(tokens, tile)
        launch = _launch(config)
        pairs = torch.empty(num_routed, tokens, dtype=torch.int32, device=device)
        counts = torch.empty(num_routed, dtype=torch.int32, device=device)
        block = min(1024, triton.next_power_of_2(ids.numel()))
        _list_tokens[num_routed,](
            ids, pairs, counts, ids.numel(), tokens, BLOCK=block, DEPENDENT=config.dependent, num_warps=4, **launch
        )
        shape = {"E": num_experts, "SLOTS": slots, "NUM_SHARED": self.num_shared, "HIDDEN": size, "INNER": inner}
        common = {
            "TOKENS": tile,
            "TMA": config.tma,
            "DEPENDENT": config.dependent,
        }
        stages = 4 if tile <= 32 else 3
        room = shared_memory(device) // x.element_size()
        warps = 4 if tile <= 64 else 8
        hidden = torch.empty(tokens * slots, inner, dtype=x.dtype, device=device)
        block_i, block_k = math.gcd(inner, 64), _power_of_2_in(size, 128)
        _up_grouped[units * (inner // block_i),](
            x, gate_up, _rows_tma(gate_up, block_k, config, block_i), ids, pairs, counts, hidden, tokens, x.stride(0),
            BLOCK_I=block_i, BLOCK_K=block_k, STAGES=min(stages, room // (block_k * (2 * block_i + tile))),
            num_warps=warps, **shape, **common, **launch,
        )  # fmt: skip
        # float32 while it is small; for a long prefill half of the memory is worth the second rounding.
        kind = torch.float32 if tokens <= 256 else x.dtype
        partial = torch.empty(tokens * slots, size, dtype=kind, device=device)
        block_k = _power_of_2_in(inner, 128)
        block_h, down_warps, down_stages = config.down_tile or DOWN_TILES.get(tile, (64, warps, stages))
        block_h = math.gcd(size, block_h)
        _down_grouped[units * (size // block_h),](
            hidden, down, _rows_tma(down, block_k, config, block_h), ids, weights, pairs, counts, partial, tokens,
            BLOCK_H=block_h, BLOCK_K=block_k, STAGES=min(down_stages, room // (block_k * (block_h + tile))),
            num_warps=down_warps,
            **shape, **common, **launch,
        )  # fmt: skip
        block_h = _power_of_2_in(size, 512)
        _sum_slots[tokens, size // block_h](
            partial, ids, out, SLOTS=slots, PADDED=triton.next_power_of_2(slots), HIDDEN=size, BLOCK_H=block_h,
            DEPENDENT=config.dependent, num_warps=4, **launch,
        )  # fmt: skip


def _launch(config: Config) -> dict[str, Any]:
    return {"launch_pdl": True} if config.dependent else {}


def _rows_tma(weight: Tensor, block_k: int, config: Config, rows: int) -> Any:
    """A copy descriptor of [rows, block_k] tiles over the rows of all experts."""
    if not config.tma:
        return weight
    flat = weight.view(-1, weight.shape[-1])
    return TensorDescriptor(flat, list(flat.shape), list(flat.stride()), [rows, block_k])


def _power_of_2_in(size: int, at_most: int) -> int:
    """The largest power of two that divides `size`, up to a limit."""
    return min(size & -size, at_most)


def bind(target: Target, traits: Traits) -> MoeExperts:
    return MoeExperts(int(traits["num_shared"]))
