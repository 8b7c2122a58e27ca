"""How many KV blocks fit: decided from numbers alone, before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenspeed.batch import BatchLimits
from tokenspeed.errors import ConfigError
from tokenspeed.layers.forward import KVSpec

DEFAULT_SHARE = 0.4
"""Share of the available memory that the KV cache takes at most when `--kv-cache-memory` is not given.

The rest is for activations, for the page cache that the weights may be mapped from, and for the front end.
"""


def block_bytes(kv_spec: Sequence[KVSpec], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return sum(spec.elements() for spec in kv_spec) * block_size * dtype.itemsize


def num_kv_blocks(
    per_block: int,
    limits: BatchLimits,
    *,
    kv_cache_bytes: int | None,
    available: int,
    share: float = DEFAULT_SHARE,
    sessions_a_row: int = 1,
) -> int:
    """Blocks of `per_block` bytes that the cache gets, with `available` bytes of memory to take them from.

    `kv_cache_bytes` as asked for by `--kv-cache-memory`; None takes what every slot at full length needs, and as much
    for each further one of `sessions_a_row` whose next turn is awaited, at most `share` of `available`. Raises
    `ConfigError` if the bytes asked for are not there, or if the result would not hold one block.
    """
    if kv_cache_bytes is not None:
        if kv_cache_bytes > available:
            raise ConfigError(
                f"--kv-cache-memory asks for {mib(kv_cache_bytes)}, but only {mib(available)} of memory are available"
            )
        if kv_cache_bytes < per_block:
            raise ConfigError(
                f"--kv-cache-memory {mib(kv_cache_bytes)} is less than one block of {limits.block_size} tokens, "
                f"which takes {mib(per_block)}"
            )
        return kv_cache_bytes // per_block
    fits = int(available * share) // per_block
    if fits < 1:
        raise ConfigError(
            f"not enough memory for a KV cache: {mib(available)} are available, {share:.0%} of them may be "
            f"used, and one block of {limits.block_size} tokens takes {mib(per_block)}; free memory, or set "
            f"--kv-cache-memory or a smaller --block-size"
        )
    return min(fits, sessions_a_row * limits.max_rows * limits.max_blocks)


def mib(num_bytes: int) -> str:
    """For people: 1,234.5 MiB."""
    return f"{num_bytes / 2**20:,.1f} MiB"
