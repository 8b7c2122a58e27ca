"""The portable GPU backend, in Triton: NVIDIA sm80 and newer, AMD; through Triton's interpreter also on a CPU.

Tensor-memory copies and dependent launches are used from sm90 on. Nothing here imports triton before a
kernel is chosen.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os

import torch

from tokenspeed.kernels.registry import Implementation, Multiple, On, OneOf, lazy

_HALF = frozenset((torch.bfloat16, torch.float16))
_FLOATS = _HALF | {torch.float32}
_POWERS = OneOf(frozenset(1 << n for n in range(4, 10)))
# V2L's experts of 1,408 over four ranks are 352 wide, which 64 does not divide.
_EXPERTS: dict[str, OneOf | Multiple] = {"hidden_size": Multiple(of=64), "intermediate_size": Multiple(of=32)}
_LATENT: dict[str, OneOf | Multiple] = dict.fromkeys(("kv_lora_rank", "rope_dim", "nope_dim", "v_dim"), _POWERS)


def unavailable() -> str | None:
    """Why Triton cannot run here, or None."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _gpu(op: str, dtypes: frozenset[torch.dtype] = _HALF, **traits: OneOf | Multiple) -> Implementation:
    gpus = (On("nvidia", isa=frozenset(("sm80",))), On("amd"))
    bind = lazy(f"tokenspeed.kernels.triton.{op}:bind")
    return Implementation(op, "triton", bind, gpus, dtypes, traits, 10, unavailable=unavailable)


def _interpreted(gpu: Implementation) -> Implementation:
    """The same kernel on a CPU, for tests: chosen only when it is forced."""
    types = frozenset((torch.float32, torch.float16))  # its bfloat16 products are wrong
    return dataclasses.replace(gpu, platforms=(On("cpu"),), dtypes=types, priority=-1, variant="interpreter")


def implementations() -> tuple[Implementation, ...]:
    """The ops that have a Triton version; on a CPU only where the process asked for Triton's interpreter."""
    gpu = (
        *(_gpu(op, _FLOATS) for op in ("decode_inputs", "embedding", "kv_store", "linear", "rms_norm", "rotary")),
        *(_gpu(op, _FLOATS) for op in ("all_reduce_norm", "lm_head", "sample", "silu_mul")),
        _gpu("mha_decode", _FLOATS, head_dim=Multiple(of=16, at_most=256), block_size=Multiple(of=16)),
        _gpu("mha_prefill", _FLOATS, head_dim=Multiple(of=16, at_most=256), block_size=Multiple(of=16)),
        _gpu("mla_decode", kv_lora_rank=_POWERS, rope_dim=_POWERS, block_size=Multiple(of=16)),
        _gpu("mla_prefill", kv_lora_rank=_POWERS, rope_dim=_POWERS, block_size=Multiple(of=16)),
        _gpu("mla_block_decode", _HALF, **_LATENT, block_size=Multiple(of=16)),
        _gpu("moe_block_decode", _HALF, **_EXPERTS),
        _gpu("moe_route", _FLOATS),
        _gpu("quantise", _FLOATS, block=OneOf(frozenset(1 << n for n in range(4, 11)))),
        _gpu("moe_experts", _HALF, **_EXPERTS),
    )
    if os.environ.get("TRITON_INTERPRET") != "1":
        return gpu
    return (*gpu, *(_interpreted(each) for each in gpu))
