"""moe_route: one program a token; scores, groups and top-k in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, is_hopper, release_dependents


@triton.jit
def _route(
    logits, bias, num_tokens, ids, weights, scale, logits_stride,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_SIZE: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP_K: tl.constexpr, NUM_SHARED: tl.constexpr,
    SLOTS: tl.constexpr, SIGMOID: tl.constexpr, NORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_COUNT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    expert = tl.arange(0, EXPERTS)
    exists = expert < NUM_EXPERTS
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    x = tl.load(logits + token * logits_stride + expert, mask=exists, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        e = tl.exp(x - tl.max(x, 0))
        scores = e / tl.sum(e, 0)
    choice = scores
    if HAS_BIAS:
        choice += tl.load(bias + expert, mask=exists, other=0.0)
    choice = tl.where(exists, choice, float("-inf"))
    if TOP_GROUPS < NUM_GROUPS:
        group = tl.arange(0, GROUPS)
        member = (expert // GROUP_SIZE)[None, :] == group[:, None]
        grouped = tl.where(member, choice[None, :], float("-inf"))
        rank = tl.max(grouped, 1)
        if SIGMOID:  # a group counts by its two best experts
            best = tl.argmax(grouped, 1, tie_break_left=True)
            rank += tl.max(tl.where(expert[None, :] == best[:, None], float("-inf"), grouped), 1)
        kept = tl.zeros([EXPERTS], tl.int1)
        for _ in tl.static_range(TOP_GROUPS):
            winner = tl.argmax(rank, 0, tie_break_left=True)
            kept = kept | (expert // GROUP_SIZE == winner)
            rank = tl.where(group == winner, float("-inf"), rank)
        choice = tl.where(kept, choice, float("-inf"))
    slot = tl.arange(0, SLOTS)
    chosen = NUM_EXPERTS + slot - TOP_K
    weight = tl.where(slot < TOP_K, 0.0, 1.0)
    total = 0.0
    for k in tl.static_range(TOP_K):
        winner = tl.argmax(choice, 0, tie_break_left=True)
        score = tl.sum(tl.where(expert == winner, scores, 0.0), 0)
        chosen = tl.where(slot == k, winner, chosen)
        weight = tl.where(slot == k, score, weight)
        choice = tl.where(expert == winner, float("-inf"), choice)
        total += score
    factor = scale / (total + 1e-20) if NORMALISE else scale
    weight = tl.where(slot < TOP_K, weight * factor, weight)
    if HAS_COUNT:
        padding = token >= tl.load(num_tokens)
        chosen = tl.where(padding, -1, chosen)
        weight = tl.where(padding, 0.0, weight)
    at = token * (TOP_K + NUM_SHARED) + slot
    tl.store(ids + at, chosen, mask=slot < TOP_K + NUM_SHARED)
    tl.store(weights + at, weight, mask=slot < TOP_K + NUM_SHARED)


class Route:
    """The op for one model's routing; see `ops.MoeRoute`."""

    def __init__(self, traits: Traits) -> None:
        self.num_experts = int(traits["num_experts"])
        self.top_k = int(traits["top_k"])
        self.num_shared = int(traits["num_shared"])
        self.num_groups = int(traits["num_groups"])
        self.top_groups = int(traits["top_groups"])
        self.sigmoid = traits["scoring"] == "sigmoid"
        self.normalise = bool(traits["normalise"])

    def __call__(
        self, logits: Tensor, bias: Tensor | None, scale: float, num_tokens: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor]:
        tokens, device = logits.shape[0], logits.device
        slots = self.top_k + self.num_shared
        ids = torch.empty(tokens, slots, dtype=torch.int32, device=device)
        weights = torch.empty(tokens, slots, dtype=torch.float32, device=device)
        if tokens == 0:
            return ids, weights
        dependent = is_hopper(device)
        _route[tokens,](
            logits, bias, num_tokens, ids, weights, scale, logits.stride(0),
            NUM_EXPERTS=self.num_experts, EXPERTS=triton.next_power_of_2(self.num_experts),
            NUM_GROUPS=self.num_groups, GROUPS=triton.next_power_of_2(self.num_groups),
            GROUP_SIZE=self.num_experts // self.num_groups, TOP_GROUPS=self.top_groups, TOP_K=self.top_k,
            NUM_SHARED=self.num_shared, SLOTS=triton.next_power_of_2(slots), SIGMOID=self.sigmoid,
            NORMALISE=self.normalise, HAS_BIAS=bias is not None, HAS_COUNT=num_tokens is not None,
            DEPENDENT=dependent, num_warps=1,
            **({"launch_pdl": True} if dependent else {}),
        )  # fmt: skip
        return ids, weights


def bind(target: Target, traits: Traits) -> Route:
    return Route(traits)
