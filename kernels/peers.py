"""Memory that the ranks of a set have in common, as one of them sees it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ONE_SHOT, TWO_SHOT, PUSH = 0, 1, 2
"""The counts of calls in `Peers.calls`: of those that read terms, of those of them that summed at an owner, and
of those that push."""

PUSH_BYTES = 64 << 10
"""Of a message, up to which ranks push words, twice as many bytes, rather than let others read. 0: they never do."""


class Peers(NamedTuple):
    """N ranks, each with memory that the others read and write, for messages of up to M rows of H; this one is `rank`.

    `terms[q]` [2,M,H], of the type of x, is what rank q gives to a sum; `sums[q]` [2,M,H] is what others have summed
    for it. Even and odd calls use one half each: when a rank writes to a half again, every rank has ended the call that
    read it. `arrived[q]` [M,N] int32 counts for each row how often rank r has said to q that its term is there,
    `summed[q]` [M] how often the sum was brought. `words[q]` [2,P,N,W] int64, halves as above, zero at first, is what
    rank r pushes to q of a small message's row: each word has 32 bits of it, and above them the number of the call.
    `calls` [3,M] int32, this rank's own, counts what it has waited for.
    """

    rank: int
    terms: tuple[Tensor, ...]
    sums: tuple[Tensor, ...]
    arrived: tuple[Tensor, ...]
    summed: tuple[Tensor, ...]
    words: tuple[Tensor, ...]
    calls: Tensor

    @property
    def max_rows(self) -> int:
        """M."""
        return self.calls.shape[1]


def words_shape(num_ranks: int, hidden: int, itemsize: int) -> tuple[int, int, int, int]:
    """[2,P,N,W] of `Peers.words` for rows of `hidden` numbers of this many bytes."""
    return 2, max(1, PUSH_BYTES // (hidden * itemsize)), num_ranks, -(-hidden * itemsize // 4)
