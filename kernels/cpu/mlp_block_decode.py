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
        self._kernels, self._dtype = kernels, target.dtype
        self._hidden, self._size = int(traits["hidden_size"]), int(traits["intermediate_size"])
        self._forms = str(traits["gate_up_form"]), str(traits["down_form"])
        self._entrance = Entrance(target.dtype)
        self._weights: MlpWeights | None = None
        self._block: _ops.MlpBlock

    def __call__(self, x: Tensor, edge: Edge | None, weights: MlpWeights, /) -> tuple[Tensor, Tensor | None]:
        if weights is not self._weights:
            self._prepare(weights)
        shape = x.shape[0], self._hidden
        y = torch.empty(shape, dtype=self._dtype)
        arguments, total = self._entrance.arguments(x, edge, shape, y)
        self._block.run(*arguments)
        return y, total

    def _prepare(self, weights: MlpWeights) -> None:
        gate_up = described("gate_up", weights.gate_up, weights.gate_up_bias, self._forms[0], self._dtype)
        down = described("down", weights.down, weights.down_bias, self._forms[1], self._dtype)
        if gate_up[2:4] != (2 * self._size, self._hidden) or down[2:4] != (self._hidden, self._size):
            raise ValueError(f"gate_up is {gate_up[2:4]} and down {down[2:4]}: not {self._size} wide")
        self._block = _ops.MlpBlock(self._kernels, gate_up, down)
        self._weights = weights


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    return MlpBlockDecode(kernels, target, traits)
