"""packed_lm_head: `packed_linear` with float32 results."""

from __future__ import annotations

import torch

from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.packed_linear import product
from tokenspeed.kernels.registry import Kernel, Target, Traits


def bind(kernels: _ops.Kernels, target: Target, traits: Traits) -> Kernel:
    return product(kernels, target, str(traits["matrix_form"]), torch.float32)
