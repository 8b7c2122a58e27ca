"""Inputs of the latent-attention and mixture-of-experts ops for the numerics suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Made = tuple[str, dict[str, Any], Callable[[torch.Generator, torch.dtype], tuple[Any, ...]], Callable[..., Any]]
"""Name, traits, arguments, results, as `Case` takes them."""

MLA_SHAPES = (
    # lengths, heads, queries, block size, latent rank, rotary part
    ([70], 16, 1, 64, 64, 16),
    ([1], 3, 2, 64, 64, 16),
    ([0, 64, 65, 0, 100, 1], 4, 4, 16, 32, 16),
    ([33] * 5, 16, 1, 32, 32, 16),
    ([150, 2, 5], 5, 3, 128, 32, 16),
    ([300, 0, 64, 1000], 16, 2, 64, 512, 64),
    ([513] * 3, 33, 1, 128, 512, 64),
)


def normal(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g).to(dtype)


def latent_cache(
    g: torch.Generator, dtype: torch.dtype, lengths: list[int], block_size: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(cache, block table, lengths): permuted blocks, NaN behind every row's last token, wild unused entries."""
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=g).int()
    cache = normal(g, dtype, sum(counts) + 3, block_size, width)
    table = torch.full((len(lengths), max(counts) + 1), 2**30, dtype=torch.int32)
    start = 0
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        table[row, :count] = order[start : start + count]
        start += count
        if length % block_size:
            cache[order[start - 1], length % block_size :] = float("nan")
    cache[order[start:]] = float("nan")
    return cache, table, torch.tensor(lengths, dtype=torch.int32)


def returned(arguments: tuple[Any, ...], value: Tensor) -> tuple[Tensor, ...]:
    return (value,)


def mla_decode_cases() -> Iterator[Made]:
    for lengths, heads, queries, block_size, rank, rope in MLA_SHAPES:

        def arguments(
            g: torch.Generator, dtype: torch.dtype, ls=lengths, h=heads, n=queries, b=block_size, c=rank, p=rope
        ) -> Any:
            q = normal(g, dtype, len(ls), n, h, c + p)
            return q[..., :c], q[..., c:], *latent_cache(g, dtype, ls, b, c + p), 0.12

        traits = {"num_heads": heads, "kv_lora_rank": rank, "rope_dim": rope, "block_size": block_size}
        name = f"{len(lengths)} rows to {max(lengths)}, {queries} queries, {heads} heads, {rank}+{rope}"
        yield name, traits, arguments, returned


def mla_prefill_cases() -> Iterator[Made]:
    for query_lens, kv_lens in (((5,), (5,)), ((3, 1, 20), (70, 1, 129))):

        def arguments(g: torch.Generator, dtype: torch.dtype, n=query_lens, ls=kv_lens) -> Any:
            cache, table, kv_len = latent_cache(g, dtype, list(ls), 16, 40)
            start = torch.tensor([0, *n]).cumsum(0).int()
            q = normal(g, dtype, sum(n), 3, 24 + 8)
            return q, cache, table, start, kv_len, n, ls, normal(g, dtype, 3, 24, 32), normal(g, dtype, 3, 20, 32), 0.1

        traits = {"num_heads": 3, "nope_dim": 24, "v_dim": 20, "kv_lora_rank": 32, "rope_dim": 8, "block_size": 16}
        yield f"{query_lens} of {kv_lens}", traits, arguments, returned


def chosen_weights(arguments: tuple[Any, ...], value: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """[T, experts + 1]: each token's weights where its ids say, empty slots counted in the last column."""
    logits, (ids, weights) = arguments[0], value
    dense = torch.zeros(logits.shape[0], logits.shape[1] + 3, dtype=logits.dtype, device=logits.device)
    ones = torch.ones_like(weights)
    dense.scatter_add_(1, ids.long() % dense.shape[1], torch.where(ids < 0, ones, weights).to(logits.dtype))
    return (dense,)


ROUTES = {
    "V2-Lite": ("softmax", 64, 6, 2, 1, 1, False),
    "V2": ("softmax", 160, 6, 2, 8, 3, False),
    "V3": ("sigmoid", 256, 8, 1, 8, 4, True),
    "K2": ("sigmoid", 384, 8, 1, 1, 1, True),
    "Qwen3": ("softmax", 128, 8, 0, 1, 1, True),
    "odd": ("softmax", 12, 1, 0, 3, 2, True),
}


def moe_route_cases() -> Iterator[Made]:
    for name, (scoring, experts, top_k, shared, groups, top_groups, normalise) in ROUTES.items():
        for padding in (0, 2):

            def arguments(
                g: torch.Generator, dtype: torch.dtype, e=experts, biased=scoring == "sigmoid", p=padding
            ) -> Any:
                logits = normal(g, dtype, 7, e)
                logits[3] = 0  # all equal: the lowest ids win
                bias = torch.randn(e, generator=g) * 0.1 if biased else None
                return logits, bias, 2.5, torch.tensor([7 - p], dtype=torch.int32) if p else None

            traits = {
                "num_experts": experts, "top_k": top_k, "num_shared": shared, "num_groups": groups,
                "top_groups": top_groups, "scoring": scoring, "normalise": normalise,
            }  # fmt: skip
            yield f"{name}, {padding} padding", traits, arguments, chosen_weights


def moe_experts_cases() -> Iterator[Made]:
    for tokens, hidden, inner, experts, top_k, shared, padding in (
        (1, 128, 64, 6, 2, 1, 0),
        (3, 192, 64, 8, 3, 0, 1),
        (19, 64, 192, 4, 2, 1, 2),
        (2, 64, 64, 4, 1, 1, 2),
    ):

        def arguments(
            g: torch.Generator, dtype: torch.dtype, t=tokens, h=hidden, i=inner, e=experts, k=top_k, s=shared, p=padding
        ) -> Any:
            ids = torch.stack([torch.randperm(e, generator=g)[:k] for _ in range(t)])
            ids = torch.cat((ids, torch.arange(e, e + s).expand(t, -1)), dim=1).int()
            ids[t - p :] = -1
            weights = torch.rand(t, k + s, generator=g).masked_fill(ids < 0, 0)
            gate_up, down = normal(g, dtype, e + s, 2 * i, h) / h**0.5, normal(g, dtype, e + s, h, i) / i**0.5
            return normal(g, dtype, t, h), gate_up, down, ids, weights

        traits = {
            "num_experts": experts + shared, "num_shared": shared, "hidden_size": hidden, "intermediate_size": inner
        }  # fmt: skip
        yield f"{tokens} tokens, {experts}+{shared} experts, {padding} padding", traits, arguments, returned


MLA_MOE_CASES = {
    "mla_decode": mla_decode_cases,
    "mla_prefill": mla_prefill_cases,
    "moe_experts": moe_experts_cases,
    "moe_route": moe_route_cases,
}
