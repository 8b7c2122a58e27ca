"""embedding: rows of a table. An id outside of it is an invalid read: ids are checked where requests enter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents


@triton.jit
def _rows(ids, table, out, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    row = tl.load(ids + token).to(tl.int64)
    value = tl.load(table + row * HIDDEN + h, mask=h < HIDDEN, other=0.0)
    tl.store(out + token * HIDDEN + h, value, mask=h < HIDDEN)


def embedding(ids: Tensor, table: Tensor, /) -> Tensor:
    tokens, hidden = ids.shape[0], table.shape[1]
    out = torch.empty(tokens, hidden, dtype=table.dtype, device=table.device)
    if tokens:
        block = min(triton.next_power_of_2(hidden), 1024)
        dependent = is_hopper(table.device)
        _rows[tokens, triton.cdiv(hidden, block)](
            ids, table, out, HIDDEN=hidden, BLOCK=block, DEPENDENT=dependent,
            num_warps=max(1, block // 256), **dependent_launch(dependent),
        )  # fmt: skip
    return out


def bind(target: Target, traits: Traits) -> Kernel:
    return embedding
