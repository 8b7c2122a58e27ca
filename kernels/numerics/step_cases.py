"""Inputs of the ops around the model: what a decode step reads, and the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from tokenspeed.kernels.numerics.case import Arguments, Case, Results
from tokenspeed.kernels.sampler_state import (
    EDITS,
    HISTORY,
    MASKED,
    MIN_P,
    PROMPT,
    RANDOM,
    SORTED_CUT,
    STOP,
    SamplerState,
)
from tokenspeed.kernels.slot_state import DecodeInputs, DecodeRows, SlotState


def decode_inputs_cases() -> Iterator[Case]:
    for rows, width in ((1, 1), (7, 5), (33, 1500)):
        made = partial(decode_inputs_arguments, rows, width)
        yield Case(f"{rows} rows, {width} blocks", {}, made, _inputs, exact=True)


def decode_inputs_arguments(rows: int, width: int, g: torch.Generator, dtype: torch.dtype) -> Arguments:
    slots, block_size = rows + 3, 4
    length = torch.randint(0, width * block_size, (slots,), generator=g)
    length[rows] = 0  # the slot of padding rows
    table = torch.randint(0, 10_000, (slots, width), generator=g).int()
    table[::3, width // 2 :] = -1
    slot = torch.randperm(rows, generator=g).int()
    new, computed = torch.ones(rows, dtype=torch.int32), length[slot].int()
    length[slot[::4].long()] = -1  # not told yet: the plan's number holds
    computed[1::5] += 1  # disagrees
    slot[rows - rows // 3 :], new[rows - rows // 3 :], computed[rows - rows // 3 :] = rows, 0, 0
    token_id = torch.randint(-1, 2, (rows,), generator=g).int()
    last = torch.randint(0, 1000, (slots,), generator=g)
    state = SlotState(length, last, table)
    return DecodeRows(slot, new, computed, token_id), state, torch.full((rows,), 9, dtype=torch.int32), block_size


def _inputs(arguments: Arguments, value: DecodeInputs) -> Results:
    _, state, faults, _ = arguments
    return *value, state.length, faults


FEATURES = (
    0, EDITS, RANDOM, RANDOM | SORTED_CUT, RANDOM | MIN_P, RANDOM | SORTED_CUT | MIN_P | EDITS | HISTORY, MASKED,
    RANDOM | MASKED, RANDOM | SORTED_CUT | EDITS | MASKED,
)  # fmt: skip


def sample_cases() -> Iterator[Case]:
    for rows, vocab in ((1, 300), (12, 300), (7, 1031)):
        yield Case(f"{rows}x{vocab}", {}, partial(sample_arguments, rows, vocab), _sampled, exact=True)


def sample_arguments(rows: int, vocab: int, g: torch.Generator, dtype: torch.dtype) -> Arguments:
    logits = torch.randn(rows, vocab, generator=g) * 3
    slots = torch.randperm(rows + 2, generator=g)[:rows].int()
    if rows > 3:
        slots[1] = -1  # padding
        logits[2, 5] = torch.nan
    return logits, slots, sampler_state(g, rows + 3, vocab)


def sampler_state(g: torch.Generator, slots: int, vocab: int) -> SamplerState:
    """Tables of `slots` entries, each with other features, penalties and history."""

    def between(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(slots, generator=g)

    def some() -> torch.Tensor:
        return torch.rand(slots, vocab, generator=g) < 0.1

    seen = torch.randint(0, 3, (slots, vocab), generator=g) * some() + PROMPT * some() + STOP * some()
    bias = torch.randn(slots, vocab, generator=g).masked_fill(torch.rand(slots, vocab, generator=g) < 0.05, -torch.inf)
    features = torch.tensor([FEATURES[slot % len(FEATURES)] for slot in range(slots)], dtype=torch.int32)
    cut = features & SORTED_CUT != 0
    return SamplerState(
        features=features,
        temperature=between(0.5, 1.5),
        top_k=torch.where(cut, torch.randint(0, 40, (slots,), generator=g), 0).int(),
        top_p=torch.where(cut, between(0.5, 1.0), 1.0),
        min_p=torch.where(features & MIN_P != 0, between(0.0, 0.1), 0.0),
        repetition=between(0.8, 1.3),
        presence=between(-0.5, 0.5),
        frequency=between(-0.5, 0.5),
        min_length=torch.randint(0, 20, (slots,), generator=g).int(),
        seed=torch.randint(-(2**62), 2**62, (slots,), generator=g),
        length=torch.randint(0, 20, (slots,), generator=g),
        last_token=torch.zeros(slots, dtype=torch.int64),
        bias=bias,
        seen=seen.int(),
        mask=torch.randint(-(2**31), 2**31, (slots, -(-vocab // 32)), generator=g).int(),
    )


def _sampled(arguments: Arguments, value: torch.Tensor) -> Results:
    # The last entry of a table takes what padding rows write.
    _, _, state = arguments
    return value, state.last_token[:-1], state.seen[:-1]
