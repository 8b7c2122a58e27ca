"""Inputs of the ops that read and write the paged KV cache."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tokenspeed.kernels.numerics.case import Arguments, Case, Results, normal, weight
from tokenspeed.kernels.registry import TraitValue

NO_BLOCK = 1_000_000
"""What stands in a block table behind a row's last block: a block that does not exist."""


def paged_cache(
    g: torch.Generator, dtype: torch.dtype, lengths: Sequence[int], block_size: int, *shape: int
) -> tuple[Tensor, Tensor]:
    """(cache [blocks, block_size, ...], block table) of rows of these lengths: permuted blocks, everything outside
    the rows NaN."""
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 3, generator=g, dtype=torch.int32)
    cache = torch.full((sum(counts) + 3, block_size, *shape), torch.nan, dtype=dtype)
    table = torch.full((len(lengths), max(counts) + 2), NO_BLOCK, dtype=torch.int32)
    start = 0
    for row, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        blocks = order[start : start + count]
        table[row, :count] = blocks
        start += count
        kv = torch.full((count * block_size, *shape), torch.nan, dtype=dtype)
        kv[:length] = normal(g, dtype, length, *shape)
        cache[blocks.long()] = kv.view(count, block_size, *shape)
    return cache, table


def kv_store_cases() -> Iterator[Case]:
    for tokens, heads, head_dim, block_size in ((1, 3, 64, 16), (33, 2, 80, 64), (300, 8, 128, 16)):
        name = f"{tokens}x{heads}x{head_dim} in blocks of {block_size}"
        yield Case(name, {}, partial(kv_store_arguments, tokens, heads, head_dim, block_size), _caches)
    yield Case("17 latents of 40 in blocks of 16", {}, partial(_latent_store, 17, 40, 16), _caches)


def kv_store_arguments(
    tokens: int, heads: int, head_dim: int, block_size: int, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    blocks = 2 + 2 * tokens // block_size
    fused = normal(g, dtype, tokens, 3, heads, head_dim)
    caches = tuple(torch.full((blocks, block_size, heads, head_dim), 7.0, dtype=dtype) for _ in range(2))
    return (fused[:, 0], fused[:, 2]), caches, _slots(g, tokens, blocks * block_size)


def _latent_store(tokens: int, size: int, block_size: int, g: torch.Generator, dtype: torch.dtype) -> Arguments:
    cache = torch.full((4, block_size, size), 7.0, dtype=dtype)
    return (normal(g, dtype, tokens, size),), (cache,), _slots(g, tokens, 4 * block_size)


def _slots(g: torch.Generator, tokens: int, places: int) -> Tensor:
    slots = torch.randperm(places, generator=g)[:tokens]
    slots[1::5] = -1  # not stored
    return slots


def _caches(arguments: Arguments, value: None) -> Results:
    return tuple(arguments[1])


@dataclass(frozen=True)
class Paged:
    """Rows of (new tokens, length) over a cache in which everything outside the rows is NaN."""

    rows: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    def arguments(self, g: torch.Generator, dtype: torch.dtype) -> Arguments:
        """The arguments of `mha_prefill`; permuted blocks, entries past a row's length that do not exist."""
        query_lens, kv_lens = (tuple(each) for each in zip(*self.rows, strict=True))
        cache, table = paged_cache(g, dtype, kv_lens, self.block_size, self.kv_heads, 2 * self.head_dim)
        k, v = (half.contiguous() for half in cache.tensor_split(2, dim=-1))
        fused = normal(g, dtype, sum(query_lens), self.heads + 2 * self.kv_heads, self.head_dim)
        starts = torch.tensor([40, *(40 + start for start in itertools.accumulate(query_lens))], dtype=torch.int32)
        kv_len = torch.tensor(kv_lens, dtype=torch.int32)
        q = fused[:, : self.heads] * 2
        return q, k, v, table, starts, kv_len, query_lens, kv_lens, self.head_dim**-0.5

    def decode_arguments(self, g: torch.Generator, dtype: torch.dtype) -> Arguments:
        q, k, v, table, _, kv_len, _, kv_lens, scale = self.arguments(g, dtype)
        return q, k, v, table, kv_len, kv_lens, scale

    @property
    def traits(self) -> dict[str, TraitValue]:
        return {
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "block_size": self.block_size,
        }

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}x{self.head_dim} blocks of {self.block_size} rows {len(self.rows)}"


def ragged(lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, block_size: int) -> Case:
    """A case of `mha_decode`."""
    paged = Paged(tuple((1, length) for length in lengths), heads, kv_heads, head_dim, block_size)
    return Case(f"{paged} to {max(lengths)}", paged.traits, paged.decode_arguments, captured=0 in lengths)


def mha_decode_cases() -> Iterator[Case]:
    edges = (1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300)
    for heads, kv_heads, head_dim, block_size, lengths in (
        (9, 3, 64, 16, edges),
        (9, 3, 64, 64, (1000, 1, 513)),
        (4, 4, 80, 64, edges),
        (8, 1, 128, 256, (700, 255, 256, 257, 1)),
        (8, 1, 16, 16, (1,)),
        (3, 1, 256, 64, (130, 64)),
        (4, 2, 16, 16, (70, 1, 33)),
        (8, 2, 64, 16, (0, 130, 1, 0, 64, 65, 0)),
        (4, 4, 64, 64, (0,)),
        (16, 1, 80, 48, (200, 0, 63)),  # tiles that cross blocks
        (20, 1, 16, 64, (129,)),
    ):
        yield ragged(lengths, heads, kv_heads, head_dim, block_size)


def mha_prefill_cases() -> Iterator[Case]:
    for heads, kv_heads, head_dim, block_size, rows in (
        (9, 3, 64, 16, ((1, 1), (17, 17), (1, 40), (65, 130), (33, 96))),
        (9, 3, 64, 64, ((64, 64), (63, 128), (5, 257))),
        (4, 4, 80, 64, ((100, 100), (2, 65), (1, 64))),
        (8, 1, 128, 256, ((40, 300), (256, 256))),
        (128, 1, 32, 16, ((3, 20),)),
        (3, 1, 256, 64, ((70, 70),)),
        (4, 2, 16, 16, ((1, 1), (17, 17), (1, 40), (65, 130))),
        (6, 3, 80, 64, ((64, 64), (63, 128), (5, 257))),
    ):
        paged = Paged(rows, heads, kv_heads, head_dim, block_size)
        yield Case(str(paged), paged.traits, paged.arguments)


MLA_SHAPES = (
    # lengths, heads, queries, block size, latent rank, rotary part
    ([70], 16, 1, 64, 64, 16),
    ([1], 3, 2, 64, 64, 16),
    ([0, 64, 65, 0, 100, 1], 4, 4, 16, 32, 16),
    ([33] * 5, 16, 1, 32, 32, 16),
    ([150, 2, 5], 5, 3, 128, 32, 16),
    ([300, 0, 64, 1000], 16, 2, 64, 512, 64),
    ([513] * 3, 33, 1, 128, 512, 64),
    ([257, 1, 256], 40, 3, 48, 80, 48),  # tiles that cross blocks, more query rows than share one
)


def mla_decode_cases() -> Iterator[Case]:
    for lengths, heads, queries, block_size, rank, rope in MLA_SHAPES:
        traits = {"num_heads": heads, "kv_lora_rank": rank, "rope_dim": rope, "block_size": block_size}
        name = f"{len(lengths)} rows to {max(lengths)}, {queries} queries, {heads} heads, {rank}+{rope}"
        yield Case(name, traits, partial(mla_decode_arguments, lengths, heads, queries, block_size, rank, rope))


def mla_decode_arguments(
    lengths: Sequence[int], heads: int, queries: int, block_size: int, rank: int, rope: int,
    g: torch.Generator, dtype: torch.dtype,
) -> Arguments:  # fmt: skip
    q = normal(g, dtype, len(lengths), queries, heads, rank + rope)
    cache, table = paged_cache(g, dtype, lengths, block_size, rank + rope)
    return q[..., :rank], q[..., rank:], cache, table, torch.tensor(lengths, dtype=torch.int32), 0.12


def mla_prefill_cases() -> Iterator[Case]:
    for query_lens, kv_lens, heads, block_size, nope, value, rank, rope in (
        ((5,), (5,), 3, 16, 24, 20, 32, 8),
        ((3, 1, 20), (70, 1, 129), 3, 16, 24, 20, 32, 8),
        ((2, 9, 1), (50, 9, 40), 2, 16, 16, 32, 32, 16),
        ((70,), (130,), 2, 16, 16, 16, 16, 16),
        ((70, 97), (70, 200), 3, 48, 20, 40, 48, 16),
        ((40,), (330,), 1, 16, 16, 16, 16, 16),  # more parts than one merge takes, where pieces are of 32
        ((3, 200, 260, 7), (3, 700, 260, 400), 4, 64, 128, 128, 512, 64),
        ((300,), (1500,), 5, 64, 64, 128, 512, 64),
        # Long chunks: alone, padded, behind whole pieces of 8,192 cached tokens and a rest.
        ((1024, 2, 600), (1024, 30, 600), 2, 64, 128, 128, 512, 64),
        ((520,), (8712,), 2, 64, 128, 128, 512, 64),
        ((600,), (9600,), 1, 16, 128, 128, 256, 64),
    ):
        traits = {
            "num_heads": heads, "nope_dim": nope, "v_dim": value, "kv_lora_rank": rank, "rope_dim": rope,
            "block_size": block_size,
        }  # fmt: skip
        name = f"{query_lens} of {kv_lens}, {heads} heads, {nope}+{rope} → {value}, {rank}"
        large = max(query_lens) > 512
        yield Case(name, traits, partial(mla_prefill_arguments, query_lens, kv_lens, traits), large=large)


def mla_prefill_arguments(
    query_lens: tuple[int, ...], kv_lens: tuple[int, ...], traits: dict[str, int], g: torch.Generator,
    dtype: torch.dtype,
) -> Arguments:  # fmt: skip
    heads, nope, value, rank, rope, block_size = (
        traits[name] for name in ("num_heads", "nope_dim", "v_dim", "kv_lora_rank", "rope_dim", "block_size")
    )
    cache, table = paged_cache(g, dtype, kv_lens, block_size, rank + rope)
    starts = torch.tensor([7, *(7 + start for start in itertools.accumulate(query_lens))], dtype=torch.int32)
    q = normal(g, dtype, sum(query_lens), heads, nope + rope)
    # Key and value projection of a head lie side by side, as checkpoints have them.
    k_up, v_up = weight(g, dtype, heads, nope + value, rank).tensor_split((nope,), dim=1)
    kv_len = torch.tensor(kv_lens, dtype=torch.int32)
    return q, cache, table, starts, kv_len, query_lens, kv_lens, k_up, v_up, 0.15
