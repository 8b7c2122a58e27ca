"""decode_inputs: one launch for what takes three dozen operations; the rows' block tables are most of its bytes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels import slot_state
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.slot_state import DecodeInputs, DecodeRows, SlotState
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents

DISAGREES = tl.constexpr(slot_state.DISAGREES)
NO_BLOCK = tl.constexpr(slot_state.NO_BLOCK)


@triton.jit
def _inputs(
    slots, news, claims, ids, lengths, last_tokens, tables,
    token_ids, positions, kv_slots, kv_lens, rows_table, faults,
    WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    slot = tl.load(slots + row).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    blocks = tl.load(tables + slot * WIDTH + at, mask=at < WIDTH, other=0)
    tl.store(rows_table + row.to(tl.int64) * WIDTH + at, blocks, mask=at < WIDTH)
    if tl.program_id(1) == 0:
        new = tl.load(news + row)
        claimed = tl.load(claims + row).to(tl.int64)
        known = tl.load(lengths + slot)
        computed = tl.where(known < 0, claimed, known)
        block = tl.load(tables + slot * WIDTH + tl.minimum(computed // BLOCK_SIZE, WIDTH - 1)).to(tl.int64)
        place = tl.where((new > 0) & (block >= 0), block * BLOCK_SIZE + computed % BLOCK_SIZE, -1)
        token = tl.load(ids + row).to(tl.int64)
        token = tl.where(token < 0, tl.load(last_tokens + slot), token)
        fault = tl.where(computed != claimed, DISAGREES, 0) + tl.where((new > 0) & (block < 0), NO_BLOCK, 0)
        tl.store(lengths + slot, computed + new)
        tl.store(token_ids + row, token)
        tl.store(positions + row, computed)
        tl.store(kv_slots + row, place)
        tl.store(kv_lens + row, (computed + new).to(tl.int32))
        tl.store(faults + row, fault)


def decode_inputs(rows: DecodeRows, state: SlotState, faults: Tensor, block_size: int, /) -> DecodeInputs:
    count, width = rows.slot.shape[0], state.block_table.shape[1]
    token_ids, positions, kv_slots = torch.empty(3, count, dtype=torch.int64, device=faults.device)
    kv_len = torch.empty(count, dtype=torch.int32, device=faults.device)
    table = torch.empty(count, width, dtype=torch.int32, device=faults.device)
    if count:
        block = min(triton.next_power_of_2(width), 1024)
        dependent = is_hopper(faults.device)
        _inputs[count, triton.cdiv(width, block)](
            *rows, *state, token_ids, positions, kv_slots, kv_len, table, faults,
            WIDTH=width, BLOCK_SIZE=block_size, BLOCK=block, DEPENDENT=dependent,
            num_warps=max(1, block // 256), **dependent_launch(dependent),
        )  # fmt: skip
    return DecodeInputs(token_ids, positions, kv_slots, kv_len, table)


def bind(target: Target, traits: Traits) -> Kernel:
    return decode_inputs
