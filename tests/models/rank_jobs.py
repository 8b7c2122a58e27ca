"""What one rank of a model does in a process of a `Pool`, and what a model on one rank does for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tests.models.paged import PagedModel
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import load_weights
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.over_ranks import OverRanks
from tokenspeed.models.registry import build_model
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.world import World

BLOCK_SIZE = 16

Steps = Sequence[Sequence[Sequence[tuple[str, Sequence[int]]]]]
"""Steps of groups of ranks that attend together: the next tokens of some of the group's sequences, those with one token
first. No tokens: the one that was most likely."""


def loaded(folder: Path, mesh: Mesh, rank: int) -> CausalLM:
    """The share of `rank` of the model in `folder`."""
    source = resolve(str(folder))
    ctx = BuildContext.of(
        device=torch.device("cpu"),
        dtype=torch.float32,
        max_positions=256,
        block_size=BLOCK_SIZE,
        mesh=mesh,
        rank=rank,
    )
    model = build_model(read_model_config(source), ctx)
    load_weights(model, source)
    return model


class PagedOverRanks(PagedModel):
    """One rank's part in a model over ranks."""

    model: OverRanks

    def logits(self, hidden: torch.Tensor, padded_tokens: int | None) -> torch.Tensor:
        return self.model.logits(hidden, padded_tokens)


def one_rank(folder: Path) -> PagedModel:
    return PagedModel(loaded(folder, Mesh.single(), 0), block_size=BLOCK_SIZE, dtype=torch.float32)


def rank_of_many(world: World, folder: Path) -> PagedModel:
    model = OverRanks(loaded(folder, world.mesh, world.rank), world, "m")
    return PagedOverRanks(model, block_size=BLOCK_SIZE, dtype=torch.float32)


def generated(world: World, folder: Path, steps: Steps) -> dict[str, torch.Tensor]:
    """The logits of all tokens of this rank's group by sequence, in these steps."""
    return run(rank_of_many(world, folder), steps, world.mesh.coordinate(world.rank, "attn_data"))


def cached(world: World, folder: Path, steps: Steps) -> list[torch.Tensor]:
    """The bits of this rank's KV cache after these steps; what nobody wrote is the same everywhere."""
    paged = rank_of_many(world, folder)
    run(paged, steps, world.mesh.coordinate(world.rank, "attn_data"))
    return [tensor.view(torch.int32) for layer in paged.kv for tensor in layer]


def run(paged: PagedModel, steps: Steps, group: int) -> dict[str, torch.Tensor]:
    """What a group of `steps` gets."""
    last: dict[str, int] = {}
    logits: dict[str, list[torch.Tensor]] = {}
    for groups in steps:
        chunks = [(name, tokens or [last[name]]) for name, tokens in groups[group]]
        padded = max(sum(len(tokens) or 1 for _, tokens in chunks) for chunks in groups)
        for (name, _), rows in zip(chunks, paged.step(chunks, padded_tokens=padded), strict=True):
            logits.setdefault(name, []).append(rows)
            last[name] = int(rows[-1].argmax())
    return {name: torch.cat(parts) for name, parts in logits.items()}
