"""What the device knows of each slot, and what a decode step makes of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

DISAGREES, NO_BLOCK = 1, 2
"""Bits of a row's faults: its computed tokens are not what the device knows; its new token has no block."""


class SlotState(NamedTuple):
    """Tables of N slots: length [N] int64, the computed tokens, −1 while no step has told; last_token [N] int64;
    block_table [N,M] int32, −1 where no block is mapped."""

    length: Tensor
    last_token: Tensor
    block_table: Tensor


class DecodeRows(NamedTuple):
    """R rows of a decode step, int32 [R] each: the slot, how many new tokens (1; 0 in padding), how many the host
    believes computed, and the token's id, −1 for the slot's last token."""

    slot: Tensor
    new: Tensor
    computed: Tensor
    token_id: Tensor


class DecodeInputs(NamedTuple):
    """token_ids, positions, kv_slots [R] int64 (−1: not stored), kv_len [R] int32, block_table [R,M] int32."""

    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    kv_len: Tensor
    block_table: Tensor
