"""Kernels written for one chip, NVIDIA's Hopper (sm90), in Gluon: tiles, barriers and copies placed by hand."""

from __future__ import annotations

import dataclasses
import importlib.util

import torch

from tokenspeed.kernels.registry import Implementation, Multiple, On, OneOf, lazy


def _unavailable() -> str | None:
    try:
        found = importlib.util.find_spec("triton.experimental.gluon")
    except ModuleNotFoundError:
        found = None
    return None if found else "triton with Gluon (3.6 or newer) is not installed"


def implementations() -> tuple[Implementation, ...]:
    """The ops that have a Hopper version."""
    latent: dict[str, OneOf | Multiple] = {
        "kv_lora_rank": OneOf(frozenset((512,))),
        "rope_dim": OneOf(frozenset((64,))),
        "block_size": Multiple(of=64),
    }
    parts = OneOf(frozenset(1 << n for n in range(4, 10)))

    def hopper(op: str, **traits: OneOf | Multiple) -> Implementation:
        return Implementation(
            op,
            "hopper",
            lazy(f"tokenspeed.kernels.hopper.{op}:bind"),
            (On("nvidia", arch="sm90"),),
            frozenset((torch.bfloat16, torch.float16)),
            traits,
            priority=20,
            unavailable=_unavailable,
        )

    def all_reduce_norm(warps: int) -> Implementation:
        """Below the Triton version (10), hence only where it is asked for or `tune` finds it faster, as it did between
        two GPUs up to 32 KiB: 2.2 against 2.5 µs."""
        bind = lazy(f"tokenspeed.kernels.hopper.all_reduce_norm:bind_{warps}_warps")
        dtypes = frozenset((torch.bfloat16, torch.float16, torch.float32))
        return dataclasses.replace(
            hopper("all_reduce_norm"), bind=bind, dtypes=dtypes, priority=9, variant=f"{warps}warps"
        )

    return (
        hopper("mla_decode", **latent),
        hopper("mla_block_decode", **latent, nope_dim=parts, v_dim=parts),
        all_reduce_norm(4),
        all_reduce_norm(8),
    )
