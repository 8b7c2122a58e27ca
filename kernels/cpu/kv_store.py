"""kv_store: launcher of `kv_store` in kernels.cc, a copy of bytes."""

from __future__ import annotations

import math

from torch import Tensor, get_num_threads, int64

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect_contiguous
from tokenspeed.kernels.registry import Kernel, Target, Traits


def bind(target: Target, traits: Traits) -> Kernel:
    dtype = target.dtype
    launch = _ops.kv_store
    size = dtype.itemsize

    def kv_store(tensors: tuple[Tensor, ...], caches: tuple[Tensor, ...], kv_slots: Tensor, /) -> None:
        tokens = kv_slots.shape[0]
        expect_contiguous("kv_slots", kv_slots, int64, (tokens,))
        for tensor, cache in zip(tensors, caches, strict=True):
            shape = cache.shape[2:]
            expect_contiguous("a cache", cache, dtype, cache.shape)
            if tensor.dtype is not dtype or tensor.shape != (tokens, *shape):
                raise ValueError(
                    f"{tensor.dtype} {tuple(tensor.shape)} does not go into a {dtype} cache of {tuple(shape)}"
                )
            # One token must be one piece of memory; tokens themselves may lie apart.
            source = tensor if tokens == 0 or tensor[0].is_contiguous() else tensor.contiguous()
            launch(
                source.data_ptr(),
                source.stride(0) * size,
                cache.data_ptr(),
                kv_slots.data_ptr(),
                tokens,
                math.prod(shape) * size,
                cache.shape[0] * cache.shape[1],
                get_num_threads(),
            )

    return kv_store
