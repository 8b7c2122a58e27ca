"""The steps with prompts that an executor runs before the first real one.

What a step compiles, plans or allocates for the first time depends on how many tokens it has, on whether they follow
cached ones, on whether rows decode beside them, and on how many rows of a few tokens there are. Nothing here knows
which kernel asks for which size: sizes are the eighths of the largest step, and below a quarter of it the powers of two
and one between each two; rows of at most `SHORT` tokens come in powers of two. That this is enough for all kernels of
a model, `tests/executor/test_variants.py` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tokenspeed.batch import BatchLimits

PIECE = 8192
"""Tokens of a context that kernels take at a time, if not a largest step."""

CONTEXT = 7
"""Tokens before those of a step, in pieces, where a row may be so long: four, two and one of these and a block more,
so that kernels that take a context in pieces take it in all of their ways. Memory grows no further."""


SHORT = 128
"""Tokens of each of several rows."""


@dataclass(frozen=True, slots=True)
class WarmStep:
    """Rows of `query_lens` new tokens, each behind `context` cached ones; the first `num_decode` of them decode."""

    query_lens: tuple[int, ...]
    context: int = 0
    num_decode: int = 0

    @property
    def kv_lens(self) -> tuple[int, ...]:
        return tuple(self.context + new for new in self.query_lens)


def warm_steps(limits: BatchLimits) -> Iterator[WarmStep]:
    """Largest first, as what is freed then serves the smaller ones."""
    # The last block may reach over the last position that the model has.
    longest, largest = max(1, (limits.max_blocks - 1) * limits.block_size), limits.max_tokens
    whole, rest = divmod(largest, longest)
    yield WarmStep(((longest,) * whole + (rest,) * (rest > 0))[: limits.max_rows])
    for tokens in sizes(min(largest, longest)):
        context = min(CONTEXT * max(PIECE, largest) + limits.block_size, longest - tokens)
        if tokens < largest and limits.max_rows > 1:
            # With a row that decodes, in whose place the context must leave room.
            yield WarmStep((1, tokens), context, num_decode=1)
        else:
            yield WarmStep((tokens,), context)
        yield WarmStep((tokens,))
    rows = limits.max_rows
    while rows > 1:
        if new := min(SHORT, largest // rows, longest):
            yield WarmStep((new,) * rows)
        rows = 1 << (rows - 1).bit_length() - 1


def sizes(largest: int) -> list[int]:
    """Numbers of tokens, descending."""
    eighths = {max(1, largest * part // 8) for part in range(1, 9)}
    small = {factor << n for factor in (1, 3) for n in range(30)}
    return sorted(eighths | {size for size in small if size <= largest // 4}, reverse=True)
