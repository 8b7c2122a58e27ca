"""Mixture of experts: a router that chooses for each token, and experts that answer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from tokenspeed.kernels import ops
from tokenspeed.layers.mlp import GatedMLP
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.parallel import placement
from tokenspeed.parallel.cost import Work
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.placement import Boundary, Partial, Replicate, Shard
from tokenspeed.parallel.shards import Piece

AXIS, EXPERT_AXIS, WIDTH_AXIS = "moe", "moe_ep", "moe_tp"
"""All ranks that answer a token together; those that have other experts; those that have other parts of one."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens choose: the `top_k` of `num_experts` by `scoring`, within the best `top_groups` of `num_groups`.

    The weights of the chosen sum to 1 if `normalise`, and are multiplied by `scale`. `bias` is a learnt term that
    counts for the choice alone. `num_shared` experts answer every token besides.
    """

    num_experts: int
    top_k: int
    num_shared: int = 0
    num_groups: int = 1
    top_groups: int = 1
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = False
    scale: float = 1.0
    bias: bool = False


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """What a family calls the three projections of an expert."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


EXPERT_NAMES = ExpertNames()

Routed = tuple[torch.Tensor, torch.Tensor]
"""ids [T, K] int32 and weights [T, K] float32 of each token's experts, the shared ones last."""


class Router(Module):
    """Scores of x · Wᵀ, then the choice. In float32 throughout: a rounding here changes which expert answers."""

    def __init__(self, ctx: BuildContext, hidden_size: int, routing: Routing) -> None:
        super().__init__()
        self.boundary = Boundary(takes=Replicate(AXIS), gives=placement.Routed(EXPERT_AXIS, routing.top_k))
        self.scale = routing.scale
        shape = (routing.num_experts, hidden_size)
        piece = Piece(ctx.name("weight"), (slice(None),))
        self.weight = self.declare(ctx, shape, [piece], Replicate(AXIS), dtype=torch.float32)
        self.bias = None
        if routing.bias:
            piece = Piece(ctx.name("e_score_correction_bias"), (slice(None),))
            self.bias = self.declare(ctx, shape[:1], [piece], Replicate(AXIS), dtype=torch.float32)
        self._score = ops.linear(dataclasses.replace(ctx.target, dtype=torch.float32))
        self._choose = ops.moe_route(
            ctx.target,
            num_experts=routing.num_experts,
            top_k=routing.top_k,
            num_shared=routing.num_shared,
            num_groups=routing.num_groups,
            top_groups=routing.top_groups,
            scoring=routing.scoring,
            normalise=routing.normalise,
        )

    def forward(self, x: torch.Tensor, num_tokens: torch.Tensor | None = None) -> Routed:
        """x [T, H] → its experts; none for a row from `num_tokens` on."""
        return self._choose(self._score(x.float(), self.weight, None), self.bias, self.scale, num_tokens)


class Experts(Module):
    """Σ weight · down(silu(gate(x)) · up(x)) over each token's experts (Shazeer et al., 2017).

    Checkpoint tensors are `experts.I.…` and, the S shared ones as one expert of S times the width,
    `shared_experts.…`. Here the shared ones stand last among the others, so that one product serves all. A rank has
    its share of the experts, of each a part of its width, and leaves a token's other experts to other ranks.
    """

    def __init__(
        self,
        ctx: BuildContext,
        hidden_size: int,
        intermediate_size: int,
        routing: Routing,
        names: ExpertNames,
    ) -> None:
        super().__init__()
        self.boundary = Boundary(takes=placement.Routed(EXPERT_AXIS, routing.top_k), gives=Partial(AXIS))
        routed, total, width = routing.num_experts, routing.num_experts + routing.num_shared, intermediate_size
        gate_up, down = [], []
        halves = ((names.gate, slice(0, width)), (names.up, slice(width, 2 * width)))
        for i in range(routed):
            expert = ctx.inside(f"experts.{i}")
            gate_up += [Piece(expert.name(f"{name}.weight"), (i, rows)) for name, rows in halves]
            down.append(Piece(expert.name(f"{names.down}.weight"), (i,)))
        shared = ctx.inside("shared_experts")
        for i in range(routing.num_shared):
            part = slice(i * width, (i + 1) * width)
            gate_up += [Piece(shared.name(f"{name}.weight"), (routed + i, rows), (part,)) for name, rows in halves]
            down.append(Piece(shared.name(f"{names.down}.weight"), (routed + i,), (slice(None), part)))
        dealt = Shard(EXPERT_AXIS, 0)
        self.gate_up = self.declare(ctx, (total, 2 * width, hidden_size), gate_up, dealt, Shard(WIDTH_AXIS, 1))
        self.down = self.declare(ctx, (total, hidden_size, width), down, dealt, Shard(WIDTH_AXIS, 2))
        self._routing, (self._held, _, width) = routing, self.down.shape
        self._num_ranks = ctx.mesh.size(EXPERT_AXIS)
        self._first = ctx.mesh.coordinate(ctx.rank, EXPERT_AXIS) * self._held
        self._apply_experts = ops.moe_experts(
            ctx.target,
            num_experts=self._held,
            num_shared=routing.num_shared,
            hidden_size=hidden_size,
            intermediate_size=width,
        )

    def work(self, tokens: int) -> Work:
        """Every expert of a rank that somebody asks is read once. t tokens that each ask k of E at random ask a share
        of 1 − (1 − k/E)^t of them in expectation, and of n ranks that have other experts the one that is asked most
        about √(2 ln n) standard deviations more."""
        routing, itemsize = self._routing, self.down.element_size()
        asked = routing.top_k / routing.num_experts
        routed = self._held - routing.num_shared
        share = 1.0 - (1.0 - asked) ** tokens
        most = routed * share + math.sqrt(2 * math.log(self._num_ranks) * routed * share * (1.0 - share))
        distinct = min(most, routed) + routing.num_shared
        numbers = 3.0 * self.down.shape[1] * self.down.shape[2]
        return Work(distinct * numbers * itemsize, 2.0 * numbers * tokens * (routed * asked + routing.num_shared))

    def forward(self, x: torch.Tensor, routed: Routed) -> torch.Tensor:
        """x [T, H] → [T, H]."""
        ids, weights = routed
        if self._num_ranks > 1:
            here = ids - self._first
            ids = torch.where((here >= 0) & (here < self._held), here, -1)
        return self._apply_experts(x, self.gate_up, self.down, ids, weights)


def _answer_together(mesh: Mesh) -> bool:
    """Whether every rank has a part of each expert, and the ranks that have its parts are those of a dense layer."""
    return mesh.size(EXPERT_AXIS) == 1 and mesh.rank_sets(WIDTH_AXIS) == mesh.rank_sets("dense")


class MoE(Module):
    """Route, then answer.

    Shared experts stand among the others where both lie over the same ranks and none of them lacks an expert;
    otherwise they are an MLP beside, which lies as dense layers do.
    """

    def __init__(
        self,
        ctx: BuildContext,
        hidden_size: int,
        intermediate_size: int,
        routing: Routing,
        *,
        names: ExpertNames = EXPERT_NAMES,
    ) -> None:
        super().__init__()
        self.boundary = Boundary(takes=Replicate(AXIS), gives=Partial(AXIS))
        self.row_bytes = hidden_size * ctx.dtype.itemsize
        self.shared_experts: GatedMLP | None = None
        if routing.num_shared and not _answer_together(ctx.mesh):
            width = routing.num_shared * intermediate_size
            self.shared_experts = GatedMLP(ctx.inside("shared_experts"), hidden_size, width)
            routing = dataclasses.replace(routing, num_shared=0)
        self.gate = Router(ctx.inside("gate"), hidden_size, routing)
        self.experts = Experts(ctx, hidden_size, intermediate_size, routing, names)
        self._block: ops.MoeBlockDecode | None = None
        if ctx.mesh.size(EXPERT_AXIS) > 1 or self.shared_experts is not None:
            return
        self._weights_of_block = ops.MoeWeights(
            router=self.gate.weight, bias=self.gate.bias, gate_up=self.experts.gate_up, down=self.experts.down
        )
        self._block = ops.moe_block_decode(
            ctx.target,
            hidden_size=hidden_size,
            intermediate_size=self.experts.down.shape[2],
            num_experts=routing.num_experts,
            top_k=routing.top_k,
            num_shared=routing.num_shared,
            num_groups=routing.num_groups,
            top_groups=routing.top_groups,
            scoring=routing.scoring,
            normalise=routing.normalise,
        )

    def stages(self) -> Iterable[tuple[str, Module]]:
        return (("gate", self.gate), ("experts", self.experts))

    def beside(self) -> Iterable[tuple[str, Module]]:
        return () if self.shared_experts is None else (("shared_experts", self.shared_experts),)

    def forward(self, x: torch.Tensor, num_tokens: torch.Tensor | None = None) -> torch.Tensor:
        """What the router's choice answers: [T, H] → [T, H]. A row from `num_tokens` on has no experts. Experts
        beside answer by themselves."""
        out: torch.Tensor = self.experts(x, self.gate(x, num_tokens))
        return out

    def decode(
        self, x: torch.Tensor, norm: RMSNorm | None, residual: torch.Tensor | None, num_tokens: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `GatedMLP.decode`; a row from `num_tokens` on has no experts, so that padding reads none."""
        if self._block is None:
            if norm is not None:
                x, residual = norm(x, residual)
            return self(x, num_tokens), residual
        edge = None if norm is None else norm.edge(residual)
        return self._block(x, edge, self._weights_of_block, self.gate.scale, num_tokens)
