"""Memory that the ranks of a set have in common, as one of them sees it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ONE_SHOT, TWO_SHOT = 0, 1
"""The two counts of calls in `Peers.calls`: of all, and of those that summed at an owner."""


class Peers(NamedTuple):
    """N ranks, each with memory that the others read and write, for messages of up to M rows of H; this one is `rank`.

    `terms[q]` [2,M,H], of the type of x, is what rank q gives to a sum; `sums[q]` [2,M,H] is what others have summed
    for it. Even and odd calls use one half each: when a rank writes to a half again, every rank has ended the call that
    read it. `arrived[q]` [M,N] int32 counts for each row how often rank r has said to q that its term is there,
    `summed[q]` [M] how often the sum was brought. `calls` [2,M] int32, this rank's own, counts what it has waited for.
    """

    rank: int
    terms: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    arrived: tuple[Tensor, ...]
    summed: tuple[Tensor, ...]
    calls: Tensor

    @property
    def max_rows(self) -> int:
        """M."""
        return self.calls.shape[1]
