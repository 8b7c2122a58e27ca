"""The specification: every op in short pure torch, on any device, in any floating type.

Sums and exponentials are in float32, or in float64 when the inputs are: that is what the numerics suite
compares every other implementation with.
"""

from __future__ import annotations

from tokenspeed.kernels.reference import (
    embedding,
    kv_store,
    linear,
    mha_decode,
    mha_prefill,
    mla_decode,
    mla_prefill,
    moe_experts,
    moe_route,
    rms_norm,
    rotary,
    silu_mul,
)
from tokenspeed.kernels.registry import Implementation


def implementations() -> tuple[Implementation, ...]:
    """One for each op."""
    modules = (
        embedding,
        kv_store,
        linear,
        mha_decode,
        mha_prefill,
        mla_decode,
        mla_prefill,
        moe_experts,
        moe_route,
        rms_norm,
        rotary,
        silu_mul,
    )
    return tuple(module.IMPLEMENTATION for module in modules)
