"""rotary: launcher of `rotary` in elementwise.h."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.registry import Kernel, Target, Traits


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    dtype = target.dtype
    launch = kernels.rotary
    head_dim, interleaved = int(traits["head_dim"]), bool(traits["interleaved"])

    def rotary(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, /) -> tuple[Tensor, Tensor]:
        tokens = q.shape[0]
        expect("q", q, dtype, (tokens, q.shape[1], head_dim))
        expect("k", k, dtype, (tokens, k.shape[1], head_dim))
        expect_contiguous("positions", positions, torch.int64, (tokens,))
        expect_contiguous("cos_sin", cos_sin, torch.float32, (cos_sin.shape[0], head_dim))
        launch(
            q.data_ptr(),
            q.stride(0),
            q.stride(1),
            q.shape[1],
            k.data_ptr(),
            k.stride(0),
            k.stride(1),
            k.shape[1],
            head_dim,
            interleaved,
            positions.data_ptr(),
            cos_sin.data_ptr(),
            cos_sin.shape[0],
            tokens,
            torch.get_num_threads(),
        )
        return q, k

    return rotary
