"""The sampler, feature by feature against the float64 oracle, and all of them mixed in one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.executor.sampling_oracle import number
from tests.executor.sampling_rows import (
    GREEDY,
    SLOTS,
    VOCAB,
    Row,
    bind,
    logits_of,
    new_sampler,
    random_logits,
    sample,
    token,
)
from tokenspeed.batch import NOT_FINITE
from tokenspeed.kernels.reference.sample import uniform
from tokenspeed.request import SamplingParams


def seen(params: SamplingParams, logits: torch.Tensor, draws: int = 4000) -> list[int]:
    """How often each token is drawn over `draws` pairs of seed and position, sixteen seeds at a time."""
    counts = torch.zeros(len(logits), dtype=torch.int64)
    tables, sampler = new_sampler(len(logits))
    slots = np.arange(SLOTS, dtype=np.int64)
    bind(tables, slots.tolist(), [Row(params, logits, seed=slot) for slot in range(SLOTS)])
    for position in range(3, 3 + draws // SLOTS):
        drawn = sampler.sample(logits.repeat(SLOTS, 1), slots, np.full(SLOTS, position)).tokens
        counts += torch.bincount(torch.from_numpy(drawn).long(), minlength=len(logits))
    return [int(count) for count in counts]


def chi_square(counts: Sequence[int], expected: Sequence[float]) -> float:
    """Pearson's statistic over the tokens that can occur; a token that cannot must not."""
    total = sum(counts)
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    return sum((c - p * total) ** 2 / (p * total) for c, p in zip(counts, expected, strict=True) if p > 0)


# Random numbers ----------------------------------------------------------------------------------------


def test_seeds_and_positions_of_any_size_draw_by_that_number() -> None:
    """Flat rows: the token is the number times the vocabulary, rounded down."""
    tables, sampler = new_sampler(4096)
    flat = Row(SamplingParams(), torch.zeros(4096))
    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 1234567890123):
        flat.seed = seed
        bind(tables, [3], [flat])
        for position in (0, 1, 49_999, 2**31):
            drawn = sampler.sample(flat.logits[None].clone(), np.array([3]), np.array([position])).tokens
            assert drawn.tolist() == [int(number(seed, position) * 4096)]


def test_random_numbers_are_even_over_positions_and_over_neighbouring_seeds() -> None:
    steps = torch.arange(20_000)
    for u in (uniform(torch.full_like(steps, 7), steps), uniform(steps, torch.full_like(steps, 100))):
        counts = torch.histc(u, bins=100, min=0, max=1)
        assert float(((counts - 200) ** 2 / 200).sum()) < 150  # 99 degrees of freedom, p ≈ 0.0007
        assert abs(float((u[1:] * u[:-1]).mean()) - 0.25) < 0.01


# Greedy ------------------------------------------------------------------------------------------------


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(VOCAB)
    logits[[250, 17, 99]] = 5.0
    assert token(Row(GREEDY, logits)) == 17
    assert token(Row(SamplingParams(temperature=0.0, top_k=5, top_p=0.5, logprobs=0), logits)) == 17


def test_a_low_temperature_is_as_good_as_greedy() -> None:
    logits = random_logits(1)
    logits[120] += 1.0
    for temperature in (1e-2, 1e-6, 1e-30, 5e-324):
        assert token(Row(SamplingParams(temperature=temperature), logits)) == int(logits.argmax())


# Distributions -----------------------------------------------------------------------------------------

FIVE = [0.05, 0.4, 0.2, 0.3, 0.05]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        (SamplingParams(), FIVE),
        (SamplingParams(top_k=2), [0, 0.4, 0, 0.3, 0]),
        (SamplingParams(top_k=4), FIVE),  # the fourth and the fifth are equal: both stay
        (SamplingParams(top_p=0.6), [0, 0.4, 0, 0.3, 0]),
        (SamplingParams(top_p=0.75), [0, 0.4, 0.2, 0.3, 0]),
        (SamplingParams(top_p=0.01), [0, 1, 0, 0, 0]),
        (SamplingParams(min_p=0.3), [0, 0.4, 0.2, 0.3, 0]),
        (SamplingParams(min_p=1.0), [0, 1, 0, 0, 0]),
        (SamplingParams(top_k=2, top_p=0.5), [0, 1, 0, 0, 0]),  # 0.4 of the 0.7 that top_k left
        (SamplingParams(min_p=0.6, top_p=0.6), [0, 0.4, 0, 0.3, 0]),
    ],
)
def test_samples_follow_the_filtered_distribution(params: SamplingParams, kept: list[float]) -> None:
    counts = seen(params, logits_of(FIVE))
    expected = [p / sum(kept) for p in kept]
    assert chi_square(counts, expected) < 20  # at most 4 degrees of freedom: p ≈ 0.0005


def test_temperature_raises_the_distribution_to_its_inverse() -> None:
    for temperature in (0.5, 2.0):
        powers = [p ** (1 / temperature) for p in FIVE]
        counts = seen(SamplingParams(temperature=temperature), logits_of(FIVE))
        assert chi_square(counts, [p / sum(powers) for p in powers]) < 20


def test_top_p_keeps_the_token_that_reaches_it_and_not_the_next() -> None:
    logits = logits_of([0.5, 0.25, 0.125, 0.125])
    assert [count > 0 for count in seen(SamplingParams(top_p=0.75), logits, 400)] == [True, True, False, False]
    assert [count > 0 for count in seen(SamplingParams(top_p=0.7500001), logits, 400)] == [True, True, True, True]


@pytest.mark.parametrize("vocab", [1, 2, 127, 128, 129, 1000])
def test_every_size_of_vocabulary_samples_within_itself(vocab: int) -> None:
    for seed in range(64):
        row = Row(SamplingParams(top_p=0.999), random_logits(seed, vocab), prompt=(0,), seed=seed)
        assert token(row) in row.expected()


def test_wide_and_narrow_cuts_of_a_flat_row_are_exact() -> None:
    """Nearly flat rows of many chunks, where a wrong bound on what must be sorted would show."""
    vocab = 4000
    for seed in range(24):
        flat = random_logits(seed, vocab, spread=0.3)
        for params in (
            SamplingParams(top_p=0.9),
            SamplingParams(top_k=20),
            SamplingParams(top_k=20, top_p=0.8),
            SamplingParams(top_k=9, min_p=0.5),
            SamplingParams(top_k=1500),
            SamplingParams(top_k=1500, top_p=0.9),
            SamplingParams(min_p=0.4, top_p=0.7),
            SamplingParams(top_k=300, min_p=0.4, top_p=0.95),
        ):
            row = Row(params, flat, seed=seed)
            assert token(row) in row.expected()


def test_equal_logits_all_stay() -> None:
    flat = torch.zeros(2000)
    drawn = {token(Row(SamplingParams(top_k=1), flat, seed=seed)) for seed in range(40)}
    assert len(drawn) > 30
    drawn = {token(Row(SamplingParams(top_p=0.001), flat, seed=seed)) for seed in range(40)}
    assert len(drawn) > 30


# Edits -------------------------------------------------------------------------------------------------


def test_logit_bias_is_added_and_minus_one_hundred_does_not_ban() -> None:
    logits = random_logits(2)
    assert token(Row(SamplingParams(temperature=0.0, logit_bias={40: 50.0}), logits)) == 40
    only = SamplingParams(temperature=0.0, logit_bias={40: -100.0}, allowed_token_ids=(40,))
    assert token(Row(only, logits)) == 40


def test_repetition_counts_the_prompt_and_presence_and_frequency_do_not() -> None:
    logits = logits_of([0.5, 0.3, 0.2])
    assert token(Row(SamplingParams(temperature=0.0, repetition_penalty=3.0), logits, prompt=(0,))) == 1
    assert token(Row(SamplingParams(temperature=0.0, presence_penalty=2.0), logits, prompt=(0,))) == 0
    assert token(Row(SamplingParams(temperature=0.0, frequency_penalty=2.0), logits, prompt=(0,))) == 0


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, repetition_penalty=1.8),
        SamplingParams(temperature=0.0, repetition_penalty=0.4),
        SamplingParams(temperature=0.0, presence_penalty=1.5),
        SamplingParams(temperature=0.0, frequency_penalty=0.7),
        SamplingParams(temperature=0.0, frequency_penalty=-0.7, presence_penalty=-0.1, repetition_penalty=1.1),
    ],
)
def test_penalties_follow_the_output_as_it_grows(params: SamplingParams) -> None:
    """Thirty tokens from fixed logits, with the state kept by the sampler; a re-bound slot agrees at every point."""
    logits = random_logits(3, spread=0.5)
    tables, sampler = new_sampler()
    row = Row(params, logits, prompt=[5, 5, 9, int(logits.argmax())])
    bind(tables, [4], [row])
    for _ in range(30):
        got = sampler.sample(logits[None].clone(), np.array([4]), np.array([row.position])).tokens[0]
        assert {int(got)} == row.expected() == {token(row)}
        row.output.append(int(got))
    assert len(set(row.output)) > 1 or params.repetition_penalty < 1 or params.frequency_penalty < 0


def test_a_bad_word_is_banned_only_where_its_beginning_stands() -> None:
    logits = logits_of([0.4, 0.3, 0.2, 0.1])
    params = SamplingParams(temperature=0.0, bad_word_ids=((2, 1, 0),))
    assert token(Row(params, logits, prompt=(2, 1))) == 1  # prompt tokens count
    assert token(Row(params, logits, prompt=(2,), output=(1,))) == 1
    assert token(Row(params, logits, prompt=(1,))) == 0
    assert token(Row(params, logits, prompt=(1, 2))) == 0
    single = SamplingParams(temperature=0.0, bad_word_ids=((0,), (1,)))
    assert token(Row(single, logits)) == 2


def test_bad_words_follow_the_tokens_as_they_come() -> None:
    logits = logits_of([0.4, 0.3, 0.2, 0.1])
    tables, sampler = new_sampler(4)
    row = Row(SamplingParams(temperature=0.0, bad_word_ids=((0, 0), (1, 0, 1), (0, 1, 0, 2))), logits, prompt=(3,))
    bind(tables, [0], [row])
    for _ in range(12):
        got = int(sampler.sample(logits[None].clone(), np.array([0]), np.array([row.position])).tokens[0])
        assert {got} == row.expected()
        row.output.append(got)
    text = row.prompt + row.output
    assert all(pair != (0, 0) for pair in pairwise(text))
    assert not any(text[at : at + 3] == [1, 0, 1] for at in range(len(text)))


def test_only_allowed_tokens_are_drawn() -> None:
    params = SamplingParams(allowed_token_ids=(1, 4))
    counts = seen(params, logits_of(FIVE))
    assert chi_square(counts, [0, 0.4 / 0.45, 0, 0, 0.05 / 0.45]) < 20


def test_stop_ids_wait_for_min_tokens() -> None:
    logits = logits_of([0.6, 0.3, 0.1])
    params = SamplingParams(temperature=0.0, min_tokens=2)
    chosen = [token(Row(params, logits, prompt=[2], output=[1] * count, stop_ids=[0])) for count in range(4)]
    assert chosen == [1, 1, 0, 0]


# Rows do not touch each other ---------------------------------------------------------------------------


def mixed_rows() -> list[Row]:
    asked = [
        GREEDY,
        SamplingParams(),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.3, top_k=40),
        SamplingParams(min_p=0.05),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4),
        SamplingParams(top_k=290, top_p=0.97, presence_penalty=0.3),
        SamplingParams(temperature=0.0, logit_bias={3: 5.0, 8: -3.0}, logprobs=3),
        SamplingParams(allowed_token_ids=tuple(range(20, 60)), bad_word_ids=((7, 21), (22,)), logprobs=0),
        SamplingParams(temperature=0.8, top_k=20, top_p=0.8, min_p=0.02, min_tokens=9, logprobs=5),
    ]
    return [
        Row(params, random_logits(100 + i), prompt=(4, 9, i), output=(7, 12, 7), seed=i * 31 - 100, stop_ids=(3, 5))
        for i, params in enumerate(asked)
    ]


def test_a_mixed_batch_gives_every_row_what_it_gets_alone() -> None:
    rows = mixed_rows()
    together = sample(rows)
    assert together.logprobs is not None
    for i, row in enumerate(rows):
        alone = sample([row])
        assert together.tokens[i] == alone.tokens[0]
        assert int(alone.tokens[0]) in row.expected()
        if row.params.logprobs is not None:
            assert alone.logprobs is not None
            k = row.params.logprobs
            assert together.logprobs.logprobs[i] == alone.logprobs.logprobs[0]
            assert together.logprobs.ranks[i] == alone.logprobs.ranks[0]
            assert together.logprobs.top_ids[i, :k].tolist() == alone.logprobs.top_ids[0].tolist()


def test_the_slot_and_the_order_of_rows_do_not_matter() -> None:
    rows = mixed_rows()
    straight = sample(rows).tokens.tolist()
    order = [7, 2, 9, 0, 5, 1, 8, 3, 6, 4]
    shuffled = sample([rows[i] for i in order], slots=[15, 3, 8, 0, 11, 2, 9, 14, 6, 1]).tokens.tolist()
    assert shuffled == [straight[i] for i in order]


def test_a_slot_forgets_its_last_request() -> None:
    logits = random_logits(5)
    tables, sampler = new_sampler()
    for row in mixed_rows():
        bind(tables, [2], [row])
        sampler.sample(row.logits[None].clone(), np.array([2]), np.array([row.position]))
    tables.release([2])
    assert not tables.bad_words
    for params in (GREEDY, SamplingParams(temperature=0.0, repetition_penalty=50.0)):
        row = Row(params, logits)
        bind(tables, [2], [row])
        got = sampler.sample(logits[None].clone(), np.array([2]), np.array([row.position]))
        assert {int(got.tokens[0])} == row.expected()
        assert got.logprobs is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_refused_alone(broken: float) -> None:
    rows = mixed_rows()
    expected = [token(row) for row in rows]
    for i, row in enumerate(rows):
        whole = row.logits
        row.logits = whole.clone()
        row.logits[50 + i] = broken
        got = sample(rows).tokens.tolist()
        assert got == [*expected[:i], NOT_FINITE, *expected[i + 1 :]]
        row.logits = whole


def test_minus_infinity_is_a_mask_unless_it_is_everywhere() -> None:
    masked = torch.full((VOCAB,), -math.inf)
    for params in (GREEDY, SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(logit_bias={3: 2.0})):
        assert token(Row(params, masked)) == NOT_FINITE
    masked[77] = -3.0
    for params in (GREEDY, SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(logit_bias={3: 2.0})):
        assert token(Row(params, masked)) == 77


def test_masks_that_leave_no_token_refuse_the_row_alone() -> None:
    logits = random_logits(6)
    nothing = SamplingParams(allowed_token_ids=(8,), bad_word_ids=((3, 8),), logprobs=2)
    early = SamplingParams(temperature=0.0, allowed_token_ids=(8,), min_tokens=1)
    rows = [Row(nothing, logits), Row(early, logits, stop_ids=(8,)), Row(GREEDY, logits)]
    assert sample(rows).tokens.tolist() == [NOT_FINITE, NOT_FINITE, int(logits.argmax())]


# Log-probabilities -------------------------------------------------------------------------------------


def test_logprobs_are_the_models_own_before_everything_else() -> None:
    logits = random_logits(7)
    params = SamplingParams(
        temperature=0.3, logit_bias={12: 100.0}, repetition_penalty=2.0, allowed_token_ids=(12, 13), logprobs=4
    )
    got = sample([Row(params, logits), Row(GREEDY, logits)]).logprobs
    assert got is not None
    exact = torch.log_softmax(logits.double(), 0)
    order = exact.sort(descending=True).indices
    assert got.token_ids[0] == 12
    assert got.logprobs[0] == pytest.approx(float(exact[12]), abs=1e-5)
    assert got.ranks[0] == 1 + int((exact > exact[12]).sum())
    assert got.top_ids[0].tolist() == order[:4].tolist()
    assert got.top_logprobs[0].tolist() == pytest.approx(exact[order[:4]].tolist(), abs=1e-5)
    assert got.ranks[1] == 0


def test_equal_logprobs_are_listed_by_id() -> None:
    logits = torch.zeros(VOCAB)
    logits[[31, 200]] = 1.0
    got = sample([Row(SamplingParams(temperature=0.0, logprobs=5), logits)]).logprobs
    assert got is not None
    assert got.top_ids[0].tolist() == [31, 200, 0, 1, 2]
    assert got.ranks[0] == 1


def test_more_logprobs_than_tokens_gives_all_tokens() -> None:
    got = sample([Row(SamplingParams(temperature=0.0, logprobs=20), logits_of([0.2, 0.5, 0.3]), prompt=(0,))]).logprobs
    assert got is not None
    assert got.top_ids[0].tolist() == [1, 2, 0]
