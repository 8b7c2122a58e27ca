"""What libraries that come with torch do better on one chip: CUTLASS's grouped products, cuDNN's attention.

Around them are this package's own Triton launches, so that nothing waits for the device.
"""

from __future__ import annotations

import importlib.util

import torch

from tokenspeed.kernels.registry import Implementation, Multiple, On, OneOf, lazy

_HALF = frozenset((torch.bfloat16, torch.float16))


def _one(*of: int) -> OneOf:
    return OneOf(frozenset(of))


def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _no_cudnn() -> str | None:
    # Values narrower than keys, and log-sum-exp without dropout, since 9.
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None or version < 90_000:
        return f"needs cuDNN 9, there is {version or 'none'}"
    return _no_triton()


def implementations() -> tuple[Implementation, ...]:
    """Where both are the fastest known: on Hopper. Grouped products of other types and chips wait for the device."""
    hopper = (On("nvidia", arch="sm90"),)
    experts = Implementation(
        "moe_experts", "library", lazy("tokenspeed.kernels.library.moe_experts:bind"), hopper,
        frozenset((torch.bfloat16,)), {"hidden_size": Multiple(of=64), "intermediate_size": Multiple(of=32)},
        priority=20, unavailable=_no_triton,
    )  # fmt: skip
    prefill = Implementation(
        "mla_prefill", "library", lazy("tokenspeed.kernels.library.mla_prefill:bind"), hopper, _HALF,
        {
            "nope_dim": _one(128), "v_dim": _one(128), "rope_dim": _one(64), "kv_lora_rank": _one(256, 512),
            "block_size": Multiple(of=16),
        },
        priority=20, unavailable=_no_cudnn,
    )  # fmt: skip
    return experts, prefill
