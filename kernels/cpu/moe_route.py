"""moe_route: launcher of moe_steps.h. Scores and choice of a token in one pass over its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.registry import Kernel, KernelError, Target, Traits


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    names = ("num_experts", "top_k", "num_shared", "num_groups", "top_groups")
    experts, top_k, shared, groups, top_groups = (int(traits[name]) for name in names)
    sigmoid = traits["scoring"] == "sigmoid"
    smallest = 2 if sigmoid and top_groups < groups else 1
    if experts % groups or experts < smallest * groups or not 0 < top_k <= top_groups * (experts // groups):
        raise KernelError(f"no {top_k} of {experts} experts can be had from {top_groups} of {groups} groups")
    dtype, slots = target.dtype, top_k + shared
    launch = _ops.MoeRoute(kernels, experts, top_k, shared, groups, top_groups, sigmoid, bool(traits["normalise"])).run

    def moe_route(
        logits: Tensor, bias: Tensor | None, scale: float, num_tokens: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor]:
        tokens = logits.shape[0]
        # A router's scores are in float32, whatever the type of the activations.
        wide = logits.dtype is torch.float32
        expect("logits", logits, torch.float32 if wide else dtype, (tokens, experts))
        if bias is not None:
            expect_contiguous("bias", bias, torch.float32, (experts,))
        if num_tokens is not None:
            expect("num_tokens", num_tokens, torch.int32, (1,))
        ids = torch.empty((tokens, slots), dtype=torch.int32)
        weights = torch.empty((tokens, slots), dtype=torch.float32)
        launch(
            logits.data_ptr(),
            logits.stride(0),
            wide,
            0 if bias is None else bias.data_ptr(),
            scale,
            tokens,
            0 if num_tokens is None else num_tokens.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            torch.get_num_threads(),
        )
        return ids, weights

    return moe_route
