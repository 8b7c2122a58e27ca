"""decode_inputs: what a decode step's rows read and write, from the plan and the tables of their slots."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Implementation, plain
from tokenspeed.kernels.slot_state import DISAGREES, NO_BLOCK, DecodeInputs, DecodeRows, SlotState


def decode_inputs(rows: DecodeRows, state: SlotState, faults: Tensor, block_size: int, /) -> DecodeInputs:
    slots = rows.slot.long()
    known = state.length[slots]
    computed = torch.where(known < 0, rows.computed, known)
    kv_len = computed + rows.new
    state.length[slots] = kv_len
    table = state.block_table[slots]
    at = (computed // block_size).clamp(max=table.shape[1] - 1)
    block = table.gather(1, at[:, None])[:, 0]
    stored = rows.new > 0
    kv_slots = torch.where(stored & (block >= 0), block.long() * block_size + computed % block_size, -1)
    faults.copy_((computed != rows.computed) * DISAGREES + (stored & (block < 0)) * NO_BLOCK)
    token_ids = torch.where(rows.token_id < 0, state.last_token[slots], rows.token_id)
    return DecodeInputs(token_ids, computed, kv_slots, kv_len.int(), table)


IMPLEMENTATION = Implementation("decode_inputs", "reference", plain(decode_inputs))
