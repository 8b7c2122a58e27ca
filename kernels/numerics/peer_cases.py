"""Cases of the ops that reach into other ranks' memory: here all of it is this process's own, and the other ranks have
come already."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from tokenspeed.kernels.numerics.case import Arguments, Case, normal
from tokenspeed.kernels.peers import ONE_SHOT, PUSH, Peers

LONG_AGO = 1 << 30
"""Calls by which the other ranks are ahead."""


def all_reduce_norm_cases() -> Iterator[Case]:
    sizes = (
        (1, 576, 2, 1, True), (3, 20, 4, 0, False), (5, 64, 3, 2, True), (2, 75, 8, 5, True),
        (9, 4096, 4, 1, False), (70, 2048, 4, 3, True),
    )  # fmt: skip
    for tokens, hidden, ranks, rank, residual in sizes:
        name = f"{tokens}x{hidden}, rank {rank} of {ranks}{', residual' if residual else ''}"
        yield Case(name, {}, partial(all_reduce_norm_arguments, tokens, hidden, ranks, rank, residual))


def all_reduce_norm_arguments(
    tokens: int, hidden: int, ranks: int, rank: int, residual: bool, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    x, gain = normal(g, dtype, tokens, hidden + 8)[:, :hidden], normal(g, dtype, hidden)
    other = normal(g, dtype, tokens, hidden) if residual else None
    rows = tokens + 2
    calls = torch.randint(0, 5, (3, rows), generator=g, dtype=torch.int32)
    terms = [normal(g, dtype, 2, rows, hidden) for _ in range(ranks)]
    brought = torch.zeros(2, rows, hidden, dtype=dtype)
    half = (calls[ONE_SHOT, :tokens].long() + 1) % 2
    given = [x if each == rank else theirs[half, torch.arange(tokens)] for each, theirs in enumerate(terms)]
    brought[:, :tokens] = torch.stack(given).float().sum(0).to(dtype)
    # Where this rank sums and brings it to all, nothing is there yet.
    brought[:, rank:tokens:ranks] = 0.0
    # In words too, with other numbers in the half of the call before.
    pushed = torch.stack([normal(g, dtype, 2, rows, hidden) for _ in range(ranks)], 2)
    pushed[(calls[PUSH, :tokens].long() + 1) % 2, torch.arange(tokens)] = torch.stack(given, 1)
    peers = Peers(
        rank=rank,
        terms=tuple(terms),
        sums=tuple(brought.clone() for _ in range(ranks)),
        arrived=tuple(torch.full((rows, ranks), LONG_AGO, dtype=torch.int32) for _ in range(ranks)),
        summed=tuple(torch.full((rows,), LONG_AGO, dtype=torch.int32) for _ in range(ranks)),
        words=tuple(_words(pushed) for _ in range(ranks)),
        calls=calls,
    )
    return x, gain, 1e-5, other, peers


def _words(numbers: torch.Tensor) -> torch.Tensor:
    """[…, H] numbers as a rank finds them in `Peers.words`, int64 […, W], in the byte order of all that run this."""
    whole = torch.nn.functional.pad(numbers, (0, numbers.shape[-1] * numbers.element_size() % 4 // 2))
    data = whole.view(torch.int32)
    return torch.stack([data, torch.full_like(data, LONG_AGO)], -1).view(torch.int64).squeeze(-1)
