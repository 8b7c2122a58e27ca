"""Steps whose rows wait for masks, on both executors: nothing is sampled before they come, and only what they allow."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from tests.executor.hash_model import VOCAB, HashModel, direct_logits
from tests.executor.test_cpu_executor import binding_of, plan_of
from tests.executor.test_cpu_executor import executor_of as cpu_executor
from tests.executor.test_gpu_executor import executor_of as gpu_executor
from tokenspeed.batch import ON_DEVICE, Int32Array, Plan
from tokenspeed.errors import InvariantBroken
from tokenspeed.executor.cpu import CpuExecutor
from tokenspeed.executor.gpu import GpuExecutor
from tokenspeed.executor.interface import Binding
from tokenspeed.executor.masks import num_words
from tokenspeed.request import SamplingParams

Executor = CpuExecutor | GpuExecutor
both = pytest.mark.parametrize("make", [cpu_executor, gpu_executor], ids=["cpu", "gpu"])
LOGPROBS = SamplingParams(temperature=0.0, logprobs=1)


def mask_of(*tokens: int) -> Int32Array:
    mask = np.zeros(num_words(VOCAB), dtype=np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << token % 32)
    return mask.view(np.int32)


def masked(tokens: Sequence[int], params: SamplingParams | None = None) -> Binding:
    binding = binding_of(tokens) if params is None else binding_of(tokens, params)
    return dataclasses.replace(binding, masked=True)


def two_rows(executor: Executor) -> Plan:
    """Slot 0 continues 1 2, slot 1 continues 3 4 5."""
    rows = [(0, 0, (1, 2)), (1, 0, (3, 4, 5))]
    return plan_of(executor.new_buffers(), rows, bound=[0, 1], deltas=[(0, 0, 3), (1, 0, 4)])


def best(tokens: Sequence[int], among: Sequence[int] = range(VOCAB)) -> int:
    logits = direct_logits(list(tokens))
    return max(among, key=lambda token: float(logits[token]))


def run(make: Callable[[HashModel], Executor], work: Callable[[Executor], object]) -> None:
    executor = make(HashModel())
    try:
        asyncio.run(work(executor))  # type: ignore[arg-type]
    finally:
        executor.close()


@both
def test_a_row_samples_what_its_mask_allows_and_its_neighbour_what_it_likes(make: Callable[..., Executor]) -> None:
    async def work(executor: Executor) -> None:
        flight = executor.launch(two_rows(executor), [binding_of([1, 2]), masked([3, 4, 5])])
        assert list(flight.masked) == [1]
        waiting = asyncio.create_task(flight.tokens())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        flight.mask([mask_of(7, 31, 32, 96)])
        first = best([1, 2]), best([3, 4, 5], (7, 31, 32, 96))
        assert (await waiting).tokens[:, 0].tolist() == list(first)
        # The next step reads on the device what was sampled under the mask; None allows everything.
        rows = [(0, 2, (ON_DEVICE,)), (1, 3, (ON_DEVICE,))]
        flight = executor.launch(plan_of(executor.new_buffers(), rows, step=2), [])
        flight.mask([None])
        second = best([1, 2, first[0]]), best([3, 4, 5, first[1]])
        assert (await flight.tokens()).tokens[:, 0].tolist() == list(second)

    run(make, work)


@both
def test_masks_meet_the_row_of_their_slot_whatever_the_order_of_rows(make: Callable[..., Executor]) -> None:
    async def work(executor: Executor) -> None:
        flight = executor.launch(two_rows(executor), [masked([1, 2]), masked([3, 4, 5])])
        flight.mask([mask_of(5), mask_of(6)])
        assert (await flight.tokens()).tokens[:, 0].tolist() == [5, 6]
        rows = [(1, 3, (ON_DEVICE,)), (0, 2, (ON_DEVICE,))]
        flight = executor.launch(plan_of(executor.new_buffers(), rows, step=2), [])
        assert list(flight.masked) == [1, 0]
        flight.mask([mask_of(8), mask_of(9)])
        assert (await flight.tokens()).tokens[:, 0].tolist() == [8, 9]

    run(make, work)


@both
def test_a_mask_that_leaves_nothing_gives_no_token_and_log_probabilities_are_the_models_own(
    make: Callable[..., Executor],
) -> None:
    async def work(executor: Executor) -> None:
        flight = executor.launch(two_rows(executor), [masked([1, 2], LOGPROBS), masked([3, 4, 5])])
        flight.mask([mask_of(9), mask_of()])
        result = await flight.tokens()
        assert result.tokens[:, 0].tolist() == [9, -1]
        assert result.logprobs is not None
        expected = torch.log_softmax(direct_logits([1, 2]), 0)
        assert result.logprobs.logprobs[0] == pytest.approx(float(expected[9]), abs=1e-4)
        assert result.logprobs.top_ids[0, 0] == int(expected.argmax())

    run(make, work)


@both
def test_a_slot_that_changes_hands_no_longer_waits(make: Callable[..., Executor]) -> None:
    async def work(executor: Executor) -> None:
        flight = executor.launch(two_rows(executor), [masked([1, 2]), masked([3, 4, 5])])
        flight.mask([mask_of(5), mask_of(6)])
        await flight.tokens()
        plan = plan_of(executor.new_buffers(), [(0, 0, (8, 9))], step=2, bound=[0], deltas=[(0, 0, 5)])
        flight = executor.launch(plan, [binding_of([8, 9])])
        assert not flight.masked
        flight.mask([])
        assert (await flight.tokens()).tokens.tolist() == [[best([8, 9])]]

    run(make, work)


@both
def test_the_wrong_number_of_masks_is_noticed_and_closing_leaves_nobody_waiting(make: Callable[..., Executor]) -> None:
    async def work(executor: Executor) -> None:
        flight = executor.launch(two_rows(executor), [masked([1, 2]), masked([3, 4, 5])])
        with pytest.raises(InvariantBroken, match="1 masks"):
            flight.mask([None])
        executor.close()
        with pytest.raises(InvariantBroken, match="closed"):
            await flight.tokens()

    run(make, work)
