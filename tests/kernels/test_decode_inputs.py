"""decode_inputs: what each row of a decode step reads and writes, by the definition. The numerics suite holds the
other implementations to it."""

from __future__ import annotations

import torch

from tokenspeed.kernels.reference.decode_inputs import decode_inputs
from tokenspeed.kernels.slot_state import DISAGREES, NO_BLOCK, DecodeRows, SlotState

SIZE = 4


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def state_of(lengths: list[int], last_tokens: list[int], tables: list[list[int]]) -> SlotState:
    return SlotState(torch.tensor(lengths), torch.tensor(last_tokens), torch.tensor(tables).int())


def test_rows_read_their_slots_and_padding_stores_nothing() -> None:
    state = state_of([5, -1, 7, 0], [50, 51, 52, 53], [[8, 3, -1], [6, -1, -1], [1, 2, -1], [-1, -1, -1]])
    rows = DecodeRows(ints(2, 1, 0, 3, 3), ints(1, 1, 1, 0, 0), ints(7, 2, 5, 0, 0), ints(-1, 9, 4, 0, 0))
    faults = ints(9, 9, 9, 9, 9)
    made = decode_inputs(rows, state, faults, SIZE)
    assert made.token_ids.tolist() == [52, 9, 4, 0, 0]
    assert made.positions.tolist() == [7, 2, 5, 0, 0]
    assert made.kv_slots.tolist() == [2 * SIZE + 3, 6 * SIZE + 2, 3 * SIZE + 1, -1, -1]
    assert made.kv_len.tolist() == [8, 3, 6, 0, 0]
    assert made.block_table.tolist() == [[1, 2, -1], [6, -1, -1], [8, 3, -1], [-1, -1, -1], [-1, -1, -1]]
    assert faults.tolist() == [0] * 5
    assert state.length.tolist() == [6, 3, 8, 0]
    assert [each.dtype for each in made] == [torch.int64, torch.int64, torch.int64, torch.int32, torch.int32]


def test_what_is_wrong_with_a_row_is_told_of_that_row() -> None:
    state = state_of([5, 4, 11, 0], [0] * 4, [[8, 3, -1], [6, -1, -1], [1, 2, 4], [-1, -1, -1]])
    rows = DecodeRows(ints(0, 1, 2), ints(1, 1, 1), ints(5, 4, 12), ints(1, 1, 1))
    faults = ints(9, 9, 9)
    made = decode_inputs(rows, state, faults, SIZE)
    assert faults.tolist() == [0, NO_BLOCK, DISAGREES]
    assert made.kv_slots.tolist() == [3 * SIZE + 1, -1, 4 * SIZE + 3]
