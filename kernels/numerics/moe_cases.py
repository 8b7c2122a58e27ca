"""Inputs of the ops of a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tokenspeed.kernels.numerics.case import Arguments, Case, Results, normal, weight
from tokenspeed.kernels.registry import TraitValue

ROUTES = {
    "V2-Lite": ("softmax", 64, 6, 2, 1, 1, False),
    "V2": ("softmax", 160, 6, 2, 8, 3, False),
    "V3": ("sigmoid", 256, 8, 1, 8, 4, True),
    "K2": ("sigmoid", 384, 8, 1, 1, 1, True),
    "Qwen3": ("softmax", 128, 8, 0, 1, 1, True),
    "odd": ("softmax", 12, 1, 0, 3, 2, True),
}
"""scoring, experts, top_k, shared, groups, top_groups, normalise."""


def moe_route_cases() -> Iterator[Case]:
    for name, (scoring, experts, top_k, shared, groups, top_groups, normalise) in ROUTES.items():
        traits: dict[str, TraitValue] = {
            "num_experts": experts, "top_k": top_k, "num_shared": shared, "num_groups": groups,
            "top_groups": top_groups, "scoring": scoring, "normalise": normalise,
        }  # fmt: skip
        for padding in (0, 2):
            made = partial(moe_route_arguments, 7, experts, scoring == "sigmoid", padding)
            yield Case(f"{name}, {padding} padding", traits, made, _dense_weights)


def moe_route_arguments(
    tokens: int, experts: int, biased: bool, padding: int, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    logits = normal(g, dtype, tokens, experts)
    logits[3:4] = 0  # all equal: the lowest ids win
    bias = torch.randn(experts, generator=g) * 0.1 if biased else None
    return logits, bias, 2.5, torch.tensor([tokens - padding], dtype=torch.int32) if padding else None


def _dense_weights(arguments: Arguments, value: tuple[Tensor, Tensor]) -> Results:
    """[T, experts + 3]: each token's weights where its ids say, empty slots counted in the last column."""
    logits, (ids, weights) = arguments[0], value
    dense = torch.zeros(logits.shape[0], logits.shape[1] + 3, dtype=logits.dtype, device=logits.device)
    counted = torch.where(ids < 0, torch.ones_like(weights), weights)
    dense.scatter_add_(1, ids.long() % dense.shape[1], counted.to(logits.dtype))
    return (dense,)


def moe_experts_cases() -> Iterator[Case]:
    for tokens, hidden, inner, experts, top_k, shared, padding in (
        (1, 128, 64, 6, 2, 1, 0),
        (3, 192, 64, 8, 3, 0, 1),
        (19, 64, 192, 4, 2, 1, 2),
        (2, 64, 64, 4, 1, 1, 2),
        (1, 64, 96, 5, 2, 1, 0),
        (6, 64, 352, 2, 1, 1, 3),  # V2L's width over four ranks
        (97, 100, 52, 3, 2, 0, 5),  # more tokens an expert than are multiplied with weights as they lie
        (600, 64, 64, 20, 3, 1, 9),
        (2100, 128, 192, 64, 6, 2, 0),
    ):
        traits = {
            "num_experts": experts + shared, "num_shared": shared, "hidden_size": hidden, "intermediate_size": inner
        }  # fmt: skip
        made = partial(moe_experts_arguments, tokens, hidden, inner, experts, top_k, shared, padding)
        yield Case(f"{tokens} tokens, {experts}+{shared} experts, {padding} padding", traits, made, large=tokens > 512)


def moe_experts_arguments(
    tokens: int, hidden: int, inner: int, experts: int, top_k: int, shared: int, padding: int,
    g: torch.Generator, dtype: torch.dtype,
) -> Arguments:  # fmt: skip
    ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(tokens)])
    ids = torch.cat((ids, torch.arange(experts, experts + shared).expand(tokens, -1)), dim=1).int()
    ids[tokens - padding :] = -1
    weights = torch.rand(tokens, top_k + shared, generator=g).masked_fill(ids < 0, 0)
    gate_up = weight(g, dtype, experts + shared, 2 * inner, hidden)
    return normal(g, dtype, tokens, hidden), gate_up, weight(g, dtype, experts + shared, hidden, inner), ids, weights
