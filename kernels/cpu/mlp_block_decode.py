"""mlp_block_decode: launcher of `mlp_block` in blocks.cc, the whole block in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.block_weights import Edge, MlpWeights
from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.blocks import Entrance, described
from tokenspeed.kernels.registry import Kernel, Target, Traits


class MlpBlockDecode:
    """The block of one layer: its weights are looked at in the first call with them."""

    def __init__(self, kernels: _ops.Kernels, target: Target, traits: Traits) -> None:
        self._kernels, self._dtype, self._traits = kernels, target.dtype, traits
        self._hidden = int(traits["hidden_size"])
        self._forms = str(traits["gate_up_form"]), str(traits["down_form"])
        self._entrance = Entrance(target.dtype)
        self._weights: MlpWeights | None = None
        self._block: _ops.MlpBlock

    def __call__(self, x: Tensor, edge: Edge | None, weights: MlpWeights, /) -> tuple[Tensor, Tensor | None]:
        if weights is not self._weights:
            self._block = described_mlp(self._kernels, self._dtype, self._traits, self._forms, weights)
            self._weights = weights
        shape = x.shape[0], self._hidden
        y = torch.empty(shape, dtype=self._dtype)
        arguments, total = self._entrance.arguments(x, edge, shape, y)
        self._block.run(*arguments)
        return y, total


def described_mlp(
    kernels: _ops.Kernels, dtype: torch.dtype, traits: Traits, forms: tuple[str, str], weights: MlpWeights
) -> _ops.MlpBlock:
    """The block of these weights, whose gate_up and down are of `forms`. Raises `ValueError` for what does not fit."""
    hidden, size = int(traits["hidden_size"]), int(traits["intermediate_size"])
    gate_up = described("gate_up", weights.gate_up, weights.gate_up_bias, forms[0], dtype)
    down = described("down", weights.down, weights.down_bias, forms[1], dtype)
    if gate_up[2:4] != (2 * size, hidden) or down[2:4] != (hidden, size):
        raise ValueError(f"gate_up is {gate_up[2:4]} and down {down[2:4]}: not {size} wide")
    return _ops.MlpBlock(kernels, gate_up, down)


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    return MlpBlockDecode(kernels, target, traits)
