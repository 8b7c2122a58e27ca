"""The sampler on the device, its tables and every implementation of its op, against the float64 oracle.

Triton's version runs on a GPU if there is one; without one it is interpreted in a process of its own, because
the interpreter must be asked for before triton is imported.
"""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.executor.sampling_oracle import number
from tests.executor.sampling_rows import GREEDY, SLOTS, VOCAB, Row, logits_of, random_logits
from tokenspeed.batch import NOT_FINITE, BatchLimits
from tokenspeed.executor.slot_tables import SlotTables
from tokenspeed.executor.staging import DevicePlan, Staging
from tokenspeed.kernels import ops
from tokenspeed.kernels.ops import Sample
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.reference.sample import sample as reference
from tokenspeed.kernels.reference.sample import uniform
from tokenspeed.request import SamplingParams

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
triton_missing = importlib.util.find_spec("triton") is None


def implementations() -> list[Sample]:
    """What runs in this process."""
    found: list[Sample] = [reference]
    if DEVICE.type == "cpu":
        found.append(ops.sample(ops.Target(Platform.of(DEVICE), torch.float32)))
    if not triton_missing and (DEVICE.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"):
        from tokenspeed.kernels.triton.sample import Sample as Triton  # noqa: PLC0415 - needs a GPU or the interpreter

        found += [Triton(), Triton(chunk=128)]
    return found


every_implementation = pytest.mark.parametrize("op", implementations(), ids=lambda op: op.__module__.split(".")[-2])


class Slots:
    """The device's tables with rows bound to slots, as an executor binds them."""

    def __init__(self, op: Sample, vocab: int = VOCAB) -> None:
        limits = BatchLimits(max_rows=SLOTS, max_tokens=SLOTS, max_blocks=1, block_size=16)
        self.op = op
        self.staging = Staging(limits, vocab, DEVICE)
        self.plan = DevicePlan(self.staging, DEVICE)
        self.tables = SlotTables(limits, vocab, DEVICE)

    def bind(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        bound = [(slot, row.binding()) for slot, row in zip(slots, rows, strict=True)]
        for at, (slot, binding) in enumerate(bound):
            self.tables.write_record(self.staging, at, slot, binding)
        self.plan.receive(self.staging)
        self.tables.bind(self.plan, bound)

    def sample(self, logits: torch.Tensor, slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        """Tokens of rows of `logits`; slot −1 is padding."""
        for slot, position in zip(slots, positions, strict=True):
            if slot >= 0:
                self.tables.state.length[slot] = position
        logits = logits.clone().to(DEVICE)
        for row, slot in enumerate(slots):
            if slot in self.tables.bad_words:
                self.tables.bad_words[slot].apply(logits[row])
        tokens = self.op(logits, torch.tensor(slots, dtype=torch.int32, device=DEVICE), self.tables.state)
        for slot in slots:
            if slot in self.tables.bad_words:
                self.tables.bad_words[slot].append(self.tables.state.last_token[slot : slot + 1])
        assert tokens.dtype is torch.int32
        return tokens.tolist()


def sampled(op: Sample, rows: Sequence[Row], slots: Sequence[int] | None = None) -> list[int]:
    at = list(range(len(rows))) if slots is None else list(slots)
    device = Slots(op, len(rows[0].logits))
    device.bind(at, rows)
    return device.sample(torch.stack([row.logits for row in rows]), at, [row.position for row in rows])


def asked() -> Iterator[SamplingParams]:
    yield GREEDY
    yield SamplingParams()
    yield SamplingParams(temperature=0.3)
    yield SamplingParams(temperature=1e-30)
    yield SamplingParams(temperature=0.7, top_p=0.9)
    yield SamplingParams(top_p=0.01)
    yield SamplingParams(temperature=1.3, top_k=40)
    yield SamplingParams(top_k=1)
    yield SamplingParams(top_k=2**31 - 1, top_p=0.5)
    yield SamplingParams(top_k=290, top_p=0.97, presence_penalty=0.3)
    yield SamplingParams(min_p=0.05)
    yield SamplingParams(min_p=1.0)
    yield SamplingParams(min_p=0.3, top_k=5, top_p=0.8)
    yield SamplingParams(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.4)
    yield SamplingParams(temperature=0.0, repetition_penalty=0.4, presence_penalty=-1.0)
    yield SamplingParams(temperature=0.0, logit_bias={3: 5.0, 8: -3.0, 299: 100.0})
    yield SamplingParams(temperature=0.0, logit_bias={40: -100.0}, allowed_token_ids=(40,))
    yield SamplingParams(allowed_token_ids=tuple(range(20, 60)), bad_word_ids=((7, 21), (22,)))
    yield SamplingParams(temperature=0.8, top_k=20, top_p=0.8, min_p=0.02, min_tokens=9)


def mixed_rows(seed: int = 0) -> list[Row]:
    return [
        Row(params, random_logits(seed + i), prompt=(4, 9, i), output=(7, 12, 7), seed=i * 31 - 100, stop_ids=(3, 5))
        for i, params in enumerate(asked())
    ]


def test_the_random_number_is_splitmix64_of_seed_and_position() -> None:
    seeds = [0, 1, 2, -1, 2**63 - 1, -(2**63), 1234567890123]
    positions = [0, 1, 49_999, 2**31]
    pairs = [(seed, position) for seed in seeds for position in positions]
    got = uniform(torch.tensor([seed for seed, _ in pairs]), torch.tensor([position for _, position in pairs]))
    assert got.tolist() == [number(seed, position) for seed, position in pairs]


@every_implementation
def test_a_mixed_batch_gives_every_row_what_the_definitions_allow(op: Sample) -> None:
    for seed in range(6):
        rows = mixed_rows(seed * 100)
        for start in range(0, len(rows), SLOTS):
            part = rows[start : start + SLOTS]
            for row, token in zip(part, sampled(op, part), strict=True):
                assert token in row.expected(), row.params


@every_implementation
def test_slot_order_and_padding_do_not_matter(op: Sample) -> None:
    rows = mixed_rows()[:10]
    straight = sampled(op, rows)
    device = Slots(op)
    slots = [15, 3, 8, 0, 11, 2, 9, 14, 6, 1]
    device.bind(slots, rows)
    logits = torch.stack([torch.full((VOCAB,), math.nan), *(row.logits for row in rows), rows[0].logits])
    tokens = device.sample(logits, [-1, *slots, -1], [0, *(row.position for row in rows), 0])
    assert tokens == [-1, *straight, -1]
    assert device.tables.state.last_token[slots].tolist() == straight
    assert not device.tables.state.seen[SLOTS].any()


@every_implementation
def test_greedy_takes_the_lowest_id_among_equals(op: Sample) -> None:
    logits = torch.zeros(VOCAB)
    logits[[250, 17, 99]] = 5.0
    assert sampled(op, [Row(GREEDY, logits), Row(GREEDY, torch.zeros(VOCAB))]) == [17, 0]


@every_implementation
def test_cuts_of_flat_rows_are_exact(op: Sample) -> None:
    """Equal and nearly equal probabilities over more than one tile, where a wrong search would show."""
    vocab = 5000
    many = (
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=20),
        SamplingParams(top_k=20, top_p=0.8),
        SamplingParams(top_k=1500, top_p=0.9),
        SamplingParams(min_p=0.4, top_p=0.7),
        SamplingParams(top_k=300, min_p=0.4, top_p=0.95),
    )
    for seed in range(4):
        rows = [Row(params, random_logits(seed, vocab, spread=0.3), seed=seed + 7 * i) for i, params in enumerate(many)]
        for row, token in zip(rows, sampled(op, rows), strict=True):
            assert token in row.expected(), row.params


@every_implementation
def test_samples_follow_the_filtered_distribution(op: Sample) -> None:
    device = Slots(op, 5)
    params = SamplingParams(top_p=0.75)
    slots = list(range(SLOTS))
    logits = logits_of([0.05, 0.4, 0.2, 0.3, 0.05])
    device.bind(slots, [Row(params, logits, seed=slot) for slot in slots])
    counts = np.zeros(5)
    for position in range(3, 128):
        counts += np.bincount(device.sample(logits.repeat(SLOTS, 1), slots, [position] * SLOTS), minlength=5)
    expected = np.array([0.4, 0.2, 0.3]) / 0.9 * counts.sum()
    assert counts[[0, 4]].tolist() == [0, 0]
    assert float(((counts[1:4] - expected) ** 2 / expected).sum()) < 16  # 2 degrees of freedom, p ≈ 0.0003


@every_implementation
def test_penalties_and_bad_words_follow_the_output_as_it_grows(op: Sample) -> None:
    many = (
        SamplingParams(temperature=0.0, frequency_penalty=0.7),
        SamplingParams(temperature=0.0, presence_penalty=1.5, repetition_penalty=1.2),
        SamplingParams(bad_word_ids=((0, 0), (1, 0, 1), (0, 1, 0, 2)), frequency_penalty=0.2),
    )
    logits = torch.cat((logits_of([0.4, 0.3, 0.2, 0.1]), torch.full((20,), -4.0)))
    rows = [Row(params, logits, prompt=(3,), seed=i) for i, params in enumerate(many)]
    device = Slots(op, len(logits))
    device.bind([4, 0, 9], rows)
    for _ in range(25):
        tokens = device.sample(torch.stack([row.logits for row in rows]), [4, 0, 9], [row.position for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            assert token in row.expected()
            row.output.append(token)
        again = Slots(op, len(logits))
        again.bind([1, 2, 3], rows)
        for slot, other in ((4, 1), (0, 2), (9, 3)):
            assert torch.equal(device.tables.state.seen[slot], again.tables.state.seen[other])


@every_implementation
def test_stop_ids_wait_for_min_tokens(op: Sample) -> None:
    logits = logits_of([0.6, 0.3, 0.1])
    params = SamplingParams(temperature=0.0, min_tokens=2)
    rows = [Row(params, logits, output=[1] * count, prompt=(1, 2), stop_ids=[0]) for count in range(4)]
    assert sampled(op, rows) == [1, 1, 0, 0]


@every_implementation
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_refused_alone(op: Sample, broken: float) -> None:
    rows = mixed_rows()[:12]
    expected = sampled(op, rows)
    for i in range(0, 12, 3):
        rows[i].logits = rows[i].logits.clone()
        rows[i].logits[50 + i] = broken
        expected[i] = NOT_FINITE
    assert sampled(op, rows) == expected


@every_implementation
def test_masks_that_leave_no_token_refuse_the_row_alone(op: Sample) -> None:
    nothing = SamplingParams(allowed_token_ids=(8,), bad_word_ids=((3, 8),))
    early = SamplingParams(temperature=0.0, allowed_token_ids=(8,), min_tokens=1)
    logits, masked = random_logits(6), torch.full((VOCAB,), -math.inf)
    rows = [Row(nothing, logits), Row(early, logits, stop_ids=(8,)), Row(GREEDY, logits), Row(GREEDY, masked)]
    assert sampled(op, rows) == [NOT_FINITE, NOT_FINITE, int(logits.argmax()), NOT_FINITE]


@every_implementation
def test_a_slot_forgets_its_last_request(op: Sample) -> None:
    device = Slots(op)
    for row in mixed_rows():
        device.bind([2], [row])
        device.sample(row.logits[None], [2], [row.position])
    for params in (GREEDY, SamplingParams(temperature=0.0, repetition_penalty=50.0)):
        row = Row(params, random_logits(5))
        device.bind([2], [row])
        assert not device.tables.bad_words
        assert device.sample(row.logits[None], [2], [row.position])[0] in row.expected()


@pytest.mark.skipif(triton_missing or DEVICE.type == "cuda", reason="no triton, or a GPU runs it above")
def test_triton_interpreted_passes_the_same_tests() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "triton and (lowest or padding or finite or leave)", __file__],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
