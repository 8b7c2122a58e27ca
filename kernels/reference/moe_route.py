"""moe_route: the experts of each token and their weights (softmax or sigmoid scores, groups, top-k)."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Implementation, Target, Traits


class Route:
    """The op for one model's routing; see `ops.MoeRoute` for the formula."""

    def __init__(self, traits: Traits) -> None:
        self.top_k = int(traits["top_k"])
        self.num_shared = int(traits["num_shared"])
        self.num_groups = int(traits["num_groups"])
        self.top_groups = int(traits["top_groups"])
        self.sigmoid = traits["scoring"] == "sigmoid"
        self.normalise = bool(traits["normalise"])

    def __call__(
        self, logits: Tensor, bias: Tensor | None, scale: float, num_tokens: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor]:
        tokens, num_experts = logits.shape
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = wide.sigmoid() if self.sigmoid else wide.softmax(dim=-1)
        choice = scores if bias is None else scores + bias
        if self.top_groups < self.num_groups:
            grouped = choice.view(tokens, self.num_groups, -1)
            rank = grouped.topk(2, dim=-1).values.sum(-1) if self.sigmoid else grouped.amax(-1)
            kept = torch.zeros_like(rank, dtype=torch.bool).scatter(1, _largest(rank, self.top_groups), True)
            choice = grouped.masked_fill(~kept.unsqueeze(2), float("-inf")).flatten(1)
        routed = _largest(choice, self.top_k)
        weights = scores.gather(1, routed)
        if self.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        shared = torch.arange(num_experts, num_experts + self.num_shared, device=logits.device)
        ids = torch.cat((routed, shared.expand(tokens, -1)), dim=1)
        weights = torch.cat((weights * scale, torch.ones_like(weights[:, :1]).expand(-1, self.num_shared)), dim=1)
        if num_tokens is not None:
            padding = (torch.arange(tokens, device=logits.device) >= num_tokens).unsqueeze(1)
            ids, weights = ids.masked_fill(padding, -1), weights.masked_fill(padding, 0)
        return ids.to(torch.int32), weights.to(torch.float32)


def _largest(values: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, largest first; of equals the lower index first."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def bind(target: Target, traits: Traits) -> Route:
    return Route(traits)


IMPLEMENTATION = Implementation("moe_route", "reference", bind)
