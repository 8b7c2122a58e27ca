"""The specification: every op in short pure torch, on any device, in any floating type.

Sums and exponentials are in float32, or in float64 when the inputs are: that is what the numerics suite
compares every other implementation with.
"""

from __future__ import annotations

from tokenspeed.kernels.composed.blocks import BLOCKS, bind_block
from tokenspeed.kernels.reference import (
    all_reduce_norm,
    decode_inputs,
    embedding,
    kv_store,
    linear,
    lm_head,
    mha_decode,
    mha_prefill,
    mla_decode,
    mla_prefill,
    moe_experts,
    moe_route,
    packed,
    quantise,
    rms_norm,
    rotary,
    sample,
    silu_mul,
)
from tokenspeed.kernels.registry import Implementation, Kernel, Target, TraitValue

_PRIMITIVES = {
    module.IMPLEMENTATION.op: module.IMPLEMENTATION
    for module in (
        all_reduce_norm,
        decode_inputs,
        embedding,
        kv_store,
        linear,
        lm_head,
        mha_decode,
        mha_prefill,
        mla_decode,
        mla_prefill,
        moe_experts,
        moe_route,
        quantise,
        rms_norm,
        rotary,
        sample,
        silu_mul,
    )
} | {each.op: each for each in packed.IMPLEMENTATIONS}


def _choose(op: str, target: Target, **traits: TraitValue) -> Kernel:
    bind = bind_block(op, _choose) if op in BLOCKS else _PRIMITIVES[op].bind
    return bind(target, traits)


def implementations() -> tuple[Implementation, ...]:
    """One for each op; a block's is the composition of the references."""
    blocks = (Implementation(op, "reference", bind_block(op, _choose)) for op in BLOCKS)
    return *_PRIMITIVES.values(), *blocks
