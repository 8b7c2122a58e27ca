"""kv_store: cache.view(slots, ...)[kv_slots] = tensor, where kv_slots ≥ 0."""

from __future__ import annotations

from torch import Tensor

from tokenspeed.kernels.registry import Implementation, plain


def kv_store(tensors: tuple[Tensor, ...], caches: tuple[Tensor, ...], kv_slots: Tensor, /) -> None:
    stored = kv_slots >= 0
    for tensor, cache in zip(tensors, caches, strict=True):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, kv_slots[stored], tensor[stored])


IMPLEMENTATION = Implementation("kv_store", "reference", plain(kv_store))
