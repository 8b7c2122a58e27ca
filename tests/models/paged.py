"""A model over a paged cache with scattered blocks, driven by hand: what an executor does, without one."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from tokenspeed.layers.forward import ForwardInput
from tokenspeed.models.causal_lm import CausalLM


class PagedModel:
    """Sequences grow by chunks; their blocks are dealt from a shuffled pool, so that no two are neighbours.

    Entries of a block table past a sequence's length point to block 0, which is never dealt and holds NaN.
    """

    def __init__(self, model: CausalLM, *, block_size: int, dtype: torch.dtype, num_blocks: int = 96) -> None:
        self.model = model
        self.block_size = block_size
        self.kv = [
            tuple(torch.full((num_blocks, block_size, *shape), torch.nan, dtype=dtype) for _, shape in spec.tensors)
            for spec in model.kv_spec
        ]
        self.free = list(range(1, num_blocks))
        random.Random(11).shuffle(self.free)
        self.blocks: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(
        self, chunks: Sequence[tuple[str, Sequence[int]]], *, padded_tokens: int | None = None
    ) -> list[torch.Tensor]:
        """Compute the next tokens of some sequences in one pass: the logits [n, V] of each, in the order given.

        Chunks of one token must come first; they run as decode rows. `padded_tokens` as in `ForwardInput`.
        """
        sizes = [len(tokens) for _, tokens in chunks]
        num_decode = next((i for i, size in enumerate(sizes) if size > 1), len(sizes))
        assert all(size > 1 for size in sizes[num_decode:])
        positions, slots, ends = [], [], []
        for name, tokens in chunks:
            start = self.lengths.get(name, 0)
            end = start + len(tokens)
            table = self.blocks.setdefault(name, [])
            while len(table) * self.block_size < end:
                table.append(self.free.pop())
            positions += range(start, end)
            slots += [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(start, end)]
            ends.append(end)
            self.lengths[name] = end
        width = max((len(self.blocks[name]) for name, _ in chunks), default=0) + 1
        tables = [self.blocks[name] + [0] * (width - len(self.blocks[name])) for name, _ in chunks]
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        inputs = ForwardInput(
            token_ids=torch.tensor([token for _, tokens in chunks for token in tokens], dtype=torch.int64),
            positions=torch.tensor(positions, dtype=torch.int64),
            kv_slots=torch.tensor(slots, dtype=torch.int64),
            query_start=torch.tensor(starts, dtype=torch.int32),
            kv_len=torch.tensor(ends, dtype=torch.int32),
            block_table=torch.tensor(tables, dtype=torch.int32).view(len(chunks), width),
            num_decode=num_decode,
            query_lens=tuple(sizes),
            kv_lens=tuple(ends),
            block_size=self.block_size,
            padded_tokens=padded_tokens,
        )
        with torch.inference_mode():
            logits = self.logits(self.model.forward(inputs, self.kv), padded_tokens)
        return list(logits.split(sizes))

    def logits(self, hidden: torch.Tensor, padded_tokens: int | None) -> torch.Tensor:
        """Of all tokens; of one group of ranks among several, the largest number of whose tokens is `padded_tokens`."""
        return self.model.logits(hidden)
