"""rotary: each pair (a, b) of a head becomes (a·cos − b·sin, b·cos + a·sin), in place; q and k in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents


@triton.jit
def _turn(
    x, cos, sin, first_head, num_heads, head_stride,
    HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token."""
    head = first_head + tl.arange(0, HEADS)
    rows = x + head[:, None] * head_stride
    if INTERLEAVED:
        # Whole heads are read and written: every other element would take two transactions for one.
        d = tl.arange(0, 2 * PADDED)
        inside = (head < num_heads)[:, None] & (d < 2 * HALF)[None, :]
        pairs = tl.load(rows + d[None, :], mask=inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (HEADS, PADDED, 2)))
        turned = tl.join(a * cos[None, :] - b * sin[None, :], b * cos[None, :] + a * sin[None, :])
        turned = tl.reshape(turned, (HEADS, 2 * PADDED))
        tl.store(rows + d[None, :], turned.to(x.dtype.element_ty), mask=inside)
    else:
        i = tl.arange(0, PADDED)
        inside = (head < num_heads)[:, None] & (i < HALF)[None, :]
        a = tl.load(rows + i[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(rows + HALF + i[None, :], mask=inside, other=0.0).to(tl.float32)
        first = a * cos[None, :] - b * sin[None, :]
        second = b * cos[None, :] + a * sin[None, :]
        tl.store(rows + i[None, :], first.to(x.dtype.element_ty), mask=inside)
        tl.store(rows + HALF + i[None, :], second.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(
    q, k, positions, cos_sin, q_stride, q_head_stride, k_stride, k_head_stride, table_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    Q_BLOCKS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    i = tl.arange(0, PADDED)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    table = cos_sin + tl.load(positions + token) * table_stride + i
    cos = tl.load(table, mask=i < HALF, other=0.0)
    sin = tl.load(table + HALF, mask=i < HALF, other=0.0)
    if block < Q_BLOCKS:
        _turn(q + token * q_stride, cos, sin, block * HEADS, Q_HEADS, q_head_stride, HALF, PADDED, HEADS, INTERLEAVED)
    else:
        first = (block - Q_BLOCKS) * HEADS
        _turn(k + token * k_stride, cos, sin, first, K_HEADS, k_head_stride, HALF, PADDED, HEADS, INTERLEAVED)


def bind(target: Target, traits: Traits) -> Kernel:
    half, interleaved = int(traits["head_dim"]) // 2, bool(traits["interleaved"])
    padded = triton.next_power_of_2(half)

    def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, /) -> tuple[Tensor, Tensor]:
        tokens = q.shape[0]
        if tokens:
            # About 1,000 elements a program while tokens are few, so that they are many programs.
            size = 1024 if tokens <= 256 else 2048
            most = triton.next_power_of_2(max(q.shape[1], k.shape[1]))
            heads = min(most, max(1, size // (2 * padded)))
            dependent = is_hopper(q.device)
            _rotary[tokens, triton.cdiv(q.shape[1], heads) + triton.cdiv(k.shape[1], heads)](
                q, k, positions, cos_sin, *q.stride()[:2], *k.stride()[:2], cos_sin.stride(0),
                Q_HEADS=q.shape[1], K_HEADS=k.shape[1], HALF=half, PADDED=padded, HEADS=heads,
                INTERLEAVED=interleaved, DEPENDENT=dependent,
                num_warps=max(1, heads * padded // 256), **dependent_launch(dependent),
            )  # fmt: skip
        return q, k

    return rotary
