"""How long decode steps of a model over ranks take, without an engine: random weights, a full KV cache, the body of the
model and its logits in a graph. Of all ranks, or of one by itself."""

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
from tokenspeed.parallel.program import StepTime
from tokenspeed.parallel.world import Member

BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True)
class StepTimes:
    """A decode step of `rows` rows with `context` tokens each in each group of ranks that attends together: seconds
    measured on a rank, and what is predicted of it, whole and without collectives."""

    rows: int
    context: int
    measured: float
    predicted: StepTime
    predicted_alone: StepTime


def decode_times(
    world: Member, config: ModelConfig, dtype: torch.dtype, shapes: Sequence[tuple[int, int]], hardware: Hardware
) -> Iterator[StepTimes]:
    """Steps of so many rows with so many tokens of context each, on this rank."""
    ctx = BuildContext.of(
        device=world.device,
        dtype=dtype,
        max_positions=max(context for _, context in shapes) + 1,
        block_size=BLOCK_SIZE,
        mesh=world.mesh,
        rank=world.rank,
    )
    model = build_model(config, ctx)
    fill_random(model.weights())
    over_ranks = OverRanks(model, world, config.architecture)
    blocks = max(rows * _blocks(context) for rows, context in shapes)
    kv: list[LayerKV] = [
        tuple(
            torch.empty(blocks, BLOCK_SIZE, *shape, dtype=dtype, device=world.device).normal_()
            for _, shape in spec.tensors
        )
        for spec in model.kv_spec
    ]
    for rows, context in shapes:
        tokens = rows * world.mesh.size("attn_data")
        program = compile_model(model, world.mesh, config.architecture, tokens=tokens, hardware=hardware, captured=True)
        step = partial(_step, over_ranks, _inputs(rows, context, _blocks(context), world.device), kv)
        measured = seconds_of(world, step, 1)
        yield StepTimes(rows, context, measured, program.timing(context), program.timing_alone(context))


def _step(model: OverRanks, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
    return model.logits(model.forward(inputs, kv))


def _blocks(context: int) -> int:
    """Of a row: for its tokens and one more."""
    return context // BLOCK_SIZE + 1


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
