"""Whole blocks as the composition of ops: what runs where no fused kernel fits, whatever the platform.

Every primitive is chosen as a layer would choose it. The reference of a block is the same composition of the
references (`reference/`).
"""

from __future__ import annotations

from tokenspeed.kernels.composed.blocks import BLOCKS, bind_block
from tokenspeed.kernels.registry import Implementation
from tokenspeed.kernels.selection import select


def implementations() -> tuple[Implementation, ...]:
    """One for each block; anything fused has a higher priority."""
    return tuple(
        Implementation(op, "composed", bind_block(op, select), priority=1, selects_parts=True) for op in BLOCKS
    )
