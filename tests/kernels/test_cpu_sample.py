"""Sampling on the CPU against the reference in float64, where the cuts have to look at more than a few tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenspeed.kernels import ops
from tokenspeed.kernels.numerics.step_cases import sample_arguments, sampler_state
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.reference.sample import sample as reference
from tokenspeed.kernels.sampler_state import RANDOM, SORTED_CUT, SamplerState

TARGET = ops.Target(Platform.of(torch.device("cpu")), torch.float32)
ROWS = 24


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def wide(state: SamplerState) -> SamplerState:
    return SamplerState(*(each.double() if each.is_floating_point() else each.clone() for each in state))


def cut_by(g: torch.Generator, vocab: int, top_k: int, top_p: float, min_p: float) -> SamplerState:
    """Rows that only draw, all by the same cuts."""
    slots = ROWS + 1
    return sampler_state(g, slots, vocab)._replace(
        features=torch.full((slots,), RANDOM | SORTED_CUT, dtype=torch.int32),
        top_k=torch.full((slots,), top_k, dtype=torch.int32),
        top_p=torch.full((slots,), top_p),
        min_p=torch.full((slots,), min_p),
    )


def agree(logits: Tensor, state: SamplerState) -> bool:
    slots = torch.arange(len(logits), dtype=torch.int32)
    wanted = reference(logits.double(), slots, wide(state))
    return torch.equal(ops.sample(TARGET)(logits.clone(), slots, state), wanted)


@pytest.mark.parametrize("vocab", [1, 2, 31, 127, 128, 129, 5000])
@pytest.mark.parametrize("spread", [0.2, 1.0, 6.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (1, 1.0, 0.0), (20, 0.8, 0.0), (3000, 0.9, 0.0), (0, 0.95, 0.0), (0, 0.3, 0.02), (60, 1.0, 0.3)],
)
def test_cuts_keep_what_a_sort_would(
    vocab: int, spread: float, top_k: int, top_p: float, min_p: float, generator: torch.Generator
) -> None:
    logits = torch.randn(ROWS, vocab, generator=generator) * spread
    assert agree(logits, cut_by(generator, vocab, top_k if top_k < vocab else 0, top_p, min_p))


def test_equals_of_the_last_one_kept_stay_wherever_they_stand(generator: torch.Generator) -> None:
    """Nine values over 5,000 tokens."""
    logits = torch.randint(0, 9, (ROWS, 5000), generator=generator) / 4
    for top_k, top_p in ((1, 1.0), (700, 1.0), (0, 0.1), (700, 0.5)):
        assert agree(logits, cut_by(generator, 5000, top_k, top_p, 0.0))


def test_rows_have_their_tokens_alone_as_together_on_any_number_of_threads(generator: torch.Generator) -> None:
    logits, slots, state = sample_arguments(12, 1031, generator, torch.float32)
    before, together = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            fresh = SamplerState(*(each.clone() for each in state))
            together.append(ops.sample(TARGET)(logits.clone(), slots, fresh))
    finally:
        torch.set_num_threads(before)
    alone = [ops.sample(TARGET)(logits[row : row + 1].clone(), slots[row : row + 1], state) for row in range(12)]
    assert all(torch.equal(torch.cat(alone), each) for each in together)


def test_a_slot_past_the_tables_changes_nothing(generator: torch.Generator) -> None:
    logits, slots, state = sample_arguments(5, 300, generator, torch.float32)
    slots[3] = len(state.features)
    last, seen = state.last_token.clone(), state.seen.clone()
    with pytest.raises(IndexError, match="row 3"):
        ops.sample(TARGET)(logits, slots, state)
    assert torch.equal(state.last_token, last) and torch.equal(state.seen, seen)


def test_tables_of_other_types_or_sizes_are_refused(generator: torch.Generator) -> None:
    logits, slots, state = sample_arguments(5, 300, generator, torch.float32)
    with pytest.raises(ValueError, match=r"top_p is torch\.float64"):
        ops.sample(TARGET)(logits, slots, state._replace(top_p=state.top_p.double()))
    with pytest.raises(ValueError, match="mask is"):
        ops.sample(TARGET)(logits, slots, state._replace(mask=state.mask[:, :-1]))
    with pytest.raises(ValueError, match="logits is"):
        ops.sample(TARGET)(logits[:, :-1], slots, state)
