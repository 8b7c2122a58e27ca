"""kv_store: cache.view(slots, ...)[kv_slots] = tensor, where kv_slots ≥ 0; keys and values in one launch."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents


@triton.jit
def _copy(
    source, cache, source_stride, head_stride, token, slot, i,
    SIZE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    at = i if HEAD == SIZE else i // HEAD * head_stride + i % HEAD
    stored = (i < SIZE) & (slot >= 0)
    value = tl.load(source + token * source_stride + at, mask=stored, other=0.0)
    tl.store(cache + slot * SIZE + i, value, mask=stored)


@triton.jit
def _store(
    first, second, first_cache, second_cache, kv_slots, first_stride, second_stride, first_head, second_head,
    SIZE: tl.constexpr, FIRST_HEAD: tl.constexpr, SECOND_HEAD: tl.constexpr, BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    slot = tl.load(kv_slots + token)
    if tl.program_id(2) == 0:
        _copy(first, first_cache, first_stride, first_head, token, slot, i, SIZE, FIRST_HEAD)
    else:
        _copy(second, second_cache, second_stride, second_head, token, slot, i, SIZE, SECOND_HEAD)


def kv_store(tensors: tuple[Tensor, ...], caches: tuple[Tensor, ...], kv_slots: Tensor, /) -> None:
    if kv_slots.shape[0] == 0:
        return
    pairs = list(zip(tensors, caches, strict=True))
    while pairs:
        same = 2 if len(pairs) > 1 and pairs[0][0].shape == pairs[1][0].shape else 1
        _launch(pairs[:same], kv_slots)
        pairs = pairs[same:]


def _launch(pairs: list[tuple[Tensor, Tensor]], kv_slots: Tensor) -> None:
    """One or two tensors of one shape."""
    (first, first_cache), (second, second_cache) = pairs[0], pairs[-1]
    tokens, size = first.shape[0], math.prod(first.shape[1:])
    block = min(triton.next_power_of_2(size), 1024)
    dependent = is_hopper(first.device)
    _store[tokens, triton.cdiv(size, block), len(pairs)](
        first, second, first_cache, second_cache, kv_slots, first.stride(0), second.stride(0),
        first.stride(-2), second.stride(-2),
        SIZE=size, FIRST_HEAD=_run(first), SECOND_HEAD=_run(second), BLOCK=block, DEPENDENT=dependent,
        num_warps=max(1, block // 256), **dependent_launch(dependent),
    )  # fmt: skip


def _run(tensor: Tensor) -> int:
    """How many elements of a token lie side by side: all, or one head where the heads lie apart."""
    return math.prod(tensor.shape[1:]) if tensor[0].is_contiguous() else tensor.shape[-1]


def bind(target: Target, traits: Traits) -> Kernel:
    return kv_store
