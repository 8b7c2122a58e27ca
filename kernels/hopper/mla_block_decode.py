"""mla_block_decode on Hopper: the Triton version's launches around this folder's walk over the cache."""

from __future__ import annotations

from tokenspeed.kernels.hopper.mla_decode import MlaDecode
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.triton.mla_block_decode import MlaBlock


def bind(target: Target, traits: Traits) -> Kernel:
    return MlaBlock(target, traits, MlaDecode(int(traits["kv_lora_rank"]), int(traits["rope_dim"])))
