"""How long decode steps of a model over ranks take, without an engine: random weights, a full KV cache, the body of the
model and its logits in a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.checkpoint.random_weights import fill_random
from tokenspeed.layers.forward import ForwardInput, LayerKV
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.over_ranks import OverRanks
from tokenspeed.models.registry import build_model
from tokenspeed.parallel.compiler import compile_model
from tokenspeed.parallel.cost import Hardware
from tokenspeed.parallel.measure import seconds_of
from tokenspeed.parallel.world import World

BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A decode step of `rows` rows in each group of ranks that attends together, seconds."""

    rows: int
    measured: float
    predicted: float


def decode_times(
    world: World, config: ModelConfig, dtype: torch.dtype, rows: Sequence[int], context: int, hardware: Hardware
) -> Iterator[StepTimes]:
    """Steps of so many rows with `context` tokens each, on this rank."""
    ctx = BuildContext.of(
        device=world.device,
        dtype=dtype,
        max_positions=context + 1,
        block_size=BLOCK_SIZE,
        mesh=world.mesh,
        rank=world.rank,
    )
    model = build_model(config, ctx)
    fill_random(model.weights())
    over_ranks = OverRanks(model, world, config.architecture)
    blocks = context // BLOCK_SIZE + 1
    kv: list[LayerKV] = [
        tuple(
            torch.randn(max(rows) * blocks, BLOCK_SIZE, *shape, device=world.device).to(dtype)
            for _, shape in spec.tensors
        )
        for spec in model.kv_spec
    ]
    for number in rows:
        tokens = number * world.mesh.size("attn_data")
        program = compile_model(
            model, world.mesh, config.architecture, tokens=tokens, hardware=hardware, captured=True
        )
        step = partial(_step, over_ranks, _inputs(number, context, blocks, world.device), kv)
        yield StepTimes(number, seconds_of(world, step, 1), program.timing(context).total)


def _step(model: OverRanks, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
    return model.logits(model.forward(inputs, kv))


def _inputs(rows: int, context: int, blocks: int, device: torch.device) -> ForwardInput:
    positions = torch.full((rows,), context, device=device)
    table = torch.arange(rows * blocks, dtype=torch.int32, device=device).view(rows, blocks)
    return ForwardInput(
        token_ids=torch.arange(3, 3 + rows, device=device),
        positions=positions,
        kv_slots=table[:, context // BLOCK_SIZE].long() * BLOCK_SIZE + context % BLOCK_SIZE,
        query_start=torch.arange(rows + 1, dtype=torch.int32, device=device),
        kv_len=torch.full((rows,), context + 1, dtype=torch.int32, device=device),
        block_table=table,
        num_decode=rows,
        query_lens=(1,) * rows,
        kv_lens=(context + 1,) * rows,
        block_size=BLOCK_SIZE,
        num_tokens=torch.tensor([rows], dtype=torch.int32, device=device),
    )
