"""linear: y = x · weightᵀ + bias. Torch sums in float32 whatever the type of the inputs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.registry import Implementation, plain


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> Tensor:
    return functional.linear(x, weight, bias)


IMPLEMENTATION = Implementation("linear", "reference", plain(linear))
