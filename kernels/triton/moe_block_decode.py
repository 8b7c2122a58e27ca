"""moe_block_decode in three launches for one token: [norm + scores] [choice + up] [choice + down].

Who reads an expert ranks the scores itself: 64 of them take 0.3 µs where a launch of its own takes 1.8. The products
are those of `moe_experts` by rows. The first launch also norms a few tokens for the ops that answer them; more
tokens are the composition of ops.

Launch chain: `_up` releases `_down` after its own wait, so `_down` may read the scores before its wait and request
all of its weights. Both hold what they need of the weights before they wait where they know it: the shared experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.block_weights import Edge, MoeWeights
from tokenspeed.kernels.composed.blocks import MoeBlock as Composed
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.selection import select
from tokenspeed.kernels.triton.block_norm import norm_scores
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents

FEW = 16
"""Tokens up to which scores are vector products: each reads the router's weights again."""

MOST_EXPERTS = 64
"""Experts up to which a program ranks them, by comparing each with each."""


@triton.jit
def _choice(x, bias, e, exists, peak, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr):
    """(score that weighs, score that chooses) of experts `e` with logits x; of softmax not yet over its sum."""
    score = 1.0 / (1.0 + tl.exp(-x)) if SIGMOID else tl.exp(x - peak)
    choice = score if SIGMOID else x
    if HAS_BIAS:
        choice = choice + tl.load(bias + e, mask=exists, other=0.0)
    return score, tl.where(exists, choice, float("-inf"))


@triton.jit
def _ranked(
    logits, bias,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Each expert's place among the chosen (0 the best, of equals the lower id), and its score."""
    e = tl.arange(0, EXPERTS)
    exists = e < NUM_EXPERTS
    x = tl.load(logits + e, mask=exists, other=float("-inf"))
    score, choice = _choice(x, bias, e, exists, tl.max(x, 0), SIGMOID, HAS_BIAS)
    if not SIGMOID:
        score = score / tl.sum(score, 0)
    ahead = (choice[None, :] > choice[:, None]) | ((choice[None, :] == choice[:, None]) & (e[None, :] < e[:, None]))
    return tl.sum(ahead.to(tl.int32), 1), score


@triton.jit
def _up(
    x, gate_up, logits, bias, hidden,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK_K: tl.constexpr, INNER: tl.constexpr, ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """hidden[slot, ROWS elements] = silu(gate · x) · (up · x) of the slot's expert; the shared ones first."""
    slot = TOP_K + NUM_SHARED - 1 - tl.program_id(1)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    inside = k < HIDDEN
    at = i[:, None] * HIDDEN + k[None, :]
    expert = NUM_EXPERTS + slot - TOP_K
    if slot >= TOP_K:
        rows = gate_up + tl.cast(expert, tl.int64) * (2 * INNER * HIDDEN)
        gate_weight = tl.load(rows + at, mask=inside[None, :], other=0.0)
        up_weight = tl.load(rows + INNER * HIDDEN + at, mask=inside[None, :], other=0.0)
        dependency_wait(DEPENDENT)
    else:
        dependency_wait(DEPENDENT)
        rank, _ = _ranked(logits, bias, NUM_EXPERTS, EXPERTS, SIGMOID, HAS_BIAS)
        expert = tl.sum(tl.where(rank == slot, tl.arange(0, EXPERTS), 0), 0)
        rows = gate_up + expert.to(tl.int64) * (2 * INNER * HIDDEN)
        gate_weight = tl.load(rows + at, mask=inside[None, :], other=0.0)
        up_weight = tl.load(rows + INNER * HIDDEN + at, mask=inside[None, :], other=0.0)
    release_dependents(DEPENDENT)
    value = tl.load(x + k, mask=inside, other=0.0).to(tl.float32)
    gate = tl.sum(gate_weight.to(tl.float32) * value[None, :], 1)
    up = tl.sum(up_weight.to(tl.float32) * value[None, :], 1)
    tl.store(hidden + slot * INNER + i, (gate / (1.0 + tl.exp(-gate)) * up).to(hidden.dtype.element_ty))


@triton.jit
def _down(
    hidden, down, logits, bias, num_tokens, out, scale,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr,
    SIGMOID: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_COUNT: tl.constexpr,
    NORMALISE: tl.constexpr, SLOTS: tl.constexpr, HIDDEN: tl.constexpr, INNER: tl.constexpr, BLOCK_I: tl.constexpr,
    ROWS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[ROWS elements] = Σ weight · down · hidden over all slots."""
    release_dependents(DEPENDENT)
    h = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, BLOCK_I)
    slot = tl.arange(0, SLOTS)
    rank, score = _ranked(logits, bias, NUM_EXPERTS, EXPERTS, SIGMOID, HAS_BIAS)
    here = rank[None, :] == slot[:, None]
    expert = tl.sum(tl.where(here, tl.arange(0, EXPERTS)[None, :], 0), 1)
    weight = tl.where(slot < TOP_K, tl.sum(tl.where(here, score[None, :], 0.0), 1), 0.0)
    factor = scale / (tl.sum(weight, 0) + 1e-20) if NORMALISE else scale
    weight = tl.where(slot < TOP_K, weight * factor, 1.0)
    expert = tl.where(slot < TOP_K, expert, NUM_EXPERTS + slot - TOP_K)
    live = slot < TOP_K + NUM_SHARED
    if HAS_COUNT:
        live = live & (tl.load(num_tokens) > 0)
    rows = down + expert.to(tl.int64)[:, None, None] * (HIDDEN * INNER) + h[None, :, None] * INNER + i[None, None, :]
    tiles = ()
    for start in tl.static_range(0, INNER, BLOCK_I):
        tiles = tiles + (tl.load(rows + start, mask=live[:, None, None], other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    dependency_wait(DEPENDENT)
    acc = tl.zeros([SLOTS, ROWS], tl.float32)
    for start in tl.static_range(0, INNER, BLOCK_I):
        value = tl.load(hidden + slot[:, None] * INNER + start + i[None, :], mask=live[:, None], other=0.0)
        acc += tl.sum(tiles[start // BLOCK_I].to(tl.float32) * value.to(tl.float32)[:, None, :], 2)
    y = tl.sum(tl.where(live[:, None], acc * weight[:, None], 0.0), 0)
    tl.store(out + h, y.to(out.dtype.element_ty))


@dataclass(frozen=True)
class Config:
    """What may be tuned for one token: weight rows a program, and its warps."""

    up_rows: int = 4
    up_warps: int = 4
    down_rows: int = 2
    down_warps: int = 4


class MoeBlock:
    """The op for one shape; see `ops.MoeBlockDecode`."""

    def __init__(self, target: Target, traits: Traits, config: Config | None = None) -> None:
        self.composed = Composed(select, target, traits)
        self.num_experts, self.top_k, self.num_shared, self.hidden_size, self.inner = (
            int(traits[name])
            for name in ("num_experts", "top_k", "num_shared", "hidden_size", "intermediate_size")
        )
        self.sigmoid, self.normalise = traits["scoring"] == "sigmoid", bool(traits["normalise"])
        self.ranks = self.num_experts <= MOST_EXPERTS and int(traits["num_groups"]) == int(traits["top_groups"])
        self.config = config or Config()

    def __call__(
        self, x: Tensor, edge: Edge | None, weights: MoeWeights, scale: float, num_tokens: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor | None]:
        if not 0 < x.shape[0] <= FEW:
            return self.composed(x, edge, weights, scale, num_tokens)
        scores, y, residual = norm_scores(x, edge, weights.router)
        if x.shape[0] == 1 and self.ranks:
            return self._answer(y, scores, weights, scale, num_tokens), residual
        ids, shares = self.composed.route(scores, weights.bias, scale, num_tokens)
        return self.composed.experts(y, weights.gate_up, weights.down, ids, shares), residual

    def _answer(
        self, x: Tensor, scores: Tensor, weights: MoeWeights, scale: float, num_tokens: Tensor | None
    ) -> Tensor:
        slots, size, inner = self.top_k + self.num_shared, self.hidden_size, self.inner
        padded = triton.next_power_of_2(slots)
        hidden = torch.empty(slots, inner, dtype=x.dtype, device=x.device)
        out = torch.empty(1, size, dtype=x.dtype, device=x.device)
        dependent = is_hopper(x.device)
        common = {
            "NUM_EXPERTS": self.num_experts,
            "EXPERTS": triton.next_power_of_2(self.num_experts),
            "TOP_K": self.top_k,
            "NUM_SHARED": self.num_shared,
            "SIGMOID": self.sigmoid,
            "HAS_BIAS": weights.bias is not None,
            "HIDDEN": size,
            "INNER": inner,
            "DEPENDENT": dependent,
            **dependent_launch(dependent),
        }
        block_k = triton.next_power_of_2(size)
        # What a program holds of the weights must fit into its registers.
        up_rows = max(1, min(self.config.up_rows, 8192 // block_k))
        down_rows = self.config.down_rows
        _up[inner // up_rows, slots](
            x, weights.gate_up, scores, weights.bias, hidden,
            BLOCK_K=block_k, ROWS=up_rows, num_warps=self.config.up_warps, **common,
        )  # fmt: skip
        block_i = min(inner & -inner, 512)
        _down[size // down_rows,](
            hidden, weights.down, scores, weights.bias, num_tokens, out, scale,
            HAS_COUNT=num_tokens is not None, NORMALISE=self.normalise, SLOTS=padded, BLOCK_I=block_i,
            ROWS=down_rows, num_warps=self.config.down_warps * (1 if padded * down_rows * inner <= 24_576 else 2),
            **common,
        )  # fmt: skip
        return out


def bind(target: Target, traits: Traits) -> Kernel:
    return MoeBlock(target, traits)
