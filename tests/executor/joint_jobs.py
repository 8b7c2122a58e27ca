"""What one rank of a model in groups does in a process of a `Pool`: control plane, executor and model, without an
engine around them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.executor.test_gpu_executor import CPU, OPS
from tests.models.rank_jobs import BLOCK_SIZE, loaded
from tests.toy import VOCAB_SIZE
from tokenspeed._core.pools import Pools
from tokenspeed.batch import BatchLimits, JointPlan
from tokenspeed.executor.gpu import GpuExecutor
from tokenspeed.executor.interface import Binding, Flight
from tokenspeed.executor.joint import JointExecutor
from tokenspeed.models.over_ranks import OverRanks
from tokenspeed.parallel.world import World
from tokenspeed.request import SamplingParams

LIMITS = BatchLimits(max_rows=4, max_tokens=24, max_blocks=8, block_size=BLOCK_SIZE)
NUM_BLOCKS = 24
GREEDY = SamplingParams(temperature=0.0)

Arrivals = Sequence[tuple[int, Sequence[int]]]
"""A prompt and the step before which it comes."""


def generated(world: World, folder: Path, arrivals: Arrivals, num_tokens: int) -> dict[str, object]:
    """What each prompt gets, in steps of a GPU's executor two deep, and of the steps how many were decode steps in
    which a group had no row."""
    model = OverRanks(loaded(folder, world.mesh, world.rank), world, "m")
    kv = [
        tuple(torch.zeros(NUM_BLOCKS, BLOCK_SIZE, *shape) for _, shape in spec.tensors) for spec in model.kv_spec
    ]
    part = GpuExecutor(model, kv, limits=LIMITS, vocab_size=VOCAB_SIZE, step_ops=OPS, device=CPU, peers=world)
    executor = JointExecutor(part, world, [NUM_BLOCKS] * world.num_groups)
    core = Pools(
        num_blocks=[NUM_BLOCKS] * world.num_groups, limits=LIMITS, max_model_len=128, max_queued=16,
        prefix_caching=True, hash_key=bytes(16),
    )  # fmt: skip
    try:
        return asyncio.run(_run(core, executor, list(arrivals), num_tokens))
    finally:
        executor.close()


async def _run(
    core: Pools, executor: JointExecutor, arrivals: list[tuple[int, Sequence[int]]], num_tokens: int
) -> dict[str, object]:
    buffers = deque(executor.new_buffers() for _ in range(2))
    flights: deque[tuple[JointPlan, Flight]] = deque()
    texts: dict[int, list[int]] = {}
    no_stops = np.zeros(0, dtype=np.int32)
    step = idle = 0
    while arrivals or core.has_work:
        while arrivals and arrivals[0][0] <= step:
            prompt = np.array(arrivals.pop(0)[1], dtype=np.int32)
            core.submit(len(texts), prompt, now=float(step), max_tokens=num_tokens, stop_ids=no_stops)
            texts[len(texts)] = []
        plan = core.plan(float(step), buffers[0])
        if plan is not None:
            bindings = [Binding(GREEDY, *core.tokens_of(id), 0, no_stops) for id in plan.bound_ids.tolist()]
            flights.append((plan, executor.launch(plan, bindings)))
            idle += plan.num_rows == plan.num_decode and 0 in [each.num_rows for each in plan.parts]
            buffers.rotate()
            step += 1
        if len(flights) > 1 or (plan is None and flights):
            landed, flight = flights.popleft()
            result = await flight.tokens()
            for request_id, _, token, *_ in core.commit(landed.step, result.tokens, result.num_tokens).entries():
                texts[request_id].append(token)
    return {"texts": list(texts.values()), "idle": idle, "check": core.check()}
