"""A plug-in with one kernel: silu_mul in plain torch, preferred to everything that TokenSpeed has for a CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

from torch import Tensor
from torch.nn import functional

from tokenspeed.kernels.registry import Implementation, Kernel, On, Target, Traits


def implementations() -> Iterator[Implementation]:
    """What the plug-in adds. With SAMPLE_KERNELS=broken it fails when it has begun."""
    yield Implementation("silu_mul", "sample", bind, platforms=(On("cpu"),), priority=1000)
    if os.environ.get("SAMPLE_KERNELS") == "broken":
        raise RuntimeError("the sample was asked to break")


def bind(target: Target, traits: Traits) -> Kernel:
    """Called once for each choice, while a model is built."""
    logging.getLogger("tokenspeed.kernels").info("sample_kernels: silu_mul in %s", target.dtype)
    return silu_mul


def silu_mul(gate_up: Tensor, /) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
