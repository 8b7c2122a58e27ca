"""A decode step of groups of ranks, with what a Hopper would run of it, asks nothing of the device on the host: else no
graph could hold it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.executor.test_variants import COMMON, CPU, LATENT
from tests.kernels.variants import HOPPER, recorded
from tests.parallel.pool import started
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.kernels.registry import Target
from tokenspeed.layers.forward import ForwardInput
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.over_ranks import OverRanks
from tokenspeed.models.registry import build_model
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.world import World

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

ANSWERS = {
    "item", "_local_scalar_dense", "is_nonzero", "nonzero", "nonzero_numpy", "bincount", "masked_select", "equal",
}  # fmt: skip
"""Operations whose results, or whose results' sizes, the host waits for."""

LAYOUTS = {"experts cut": Mesh.of(2, attn_dp=2), "experts dealt": Mesh.of(2, attn_dp=2, moe_ep=2)}
BLOCK_SIZE, CONTEXT, DTYPE = 64, 500, torch.bfloat16


class Asked(TorchDispatchMode):
    """Which of `ANSWERS` were run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names |= {func._schema.name.removeprefix("aten::")} & ANSWERS
        return func(*args, **(kwargs or {}))


def asked(world: World, folder: Path, num_rows: int) -> set[str]:
    """What a decode step of a rank asks, its kernels recorded instead of run."""
    with recorded():
        ctx = BuildContext.of(
            device=CPU, dtype=DTYPE, max_positions=1024, block_size=BLOCK_SIZE, mesh=world.mesh, rank=world.rank
        )
        ctx = dataclasses.replace(ctx, target=Target(HOPPER, DTYPE))
        model = OverRanks(build_model(read_model_config(resolve(str(folder), "dummy")), ctx), world, "m")
        kv = [
            tuple(torch.zeros(1, BLOCK_SIZE, *shape, dtype=DTYPE) for _, shape in spec.tensors)
            for spec in model.kv_spec
        ]
        inputs = ForwardInput(
            token_ids=torch.zeros(num_rows, dtype=torch.int64),
            positions=torch.full((num_rows,), CONTEXT),
            kv_slots=torch.zeros(num_rows, dtype=torch.int64),
            query_start=torch.arange(num_rows + 1, dtype=torch.int32),
            kv_len=torch.full((num_rows,), CONTEXT + 1, dtype=torch.int32),
            block_table=torch.zeros(num_rows, -(-CONTEXT // BLOCK_SIZE), dtype=torch.int32),
            num_decode=num_rows,
            query_lens=(1,) * num_rows,
            kv_lens=(CONTEXT + 1,) * num_rows,
            block_size=BLOCK_SIZE,
            num_tokens=torch.zeros(1, dtype=torch.int32),
        )
        with Asked() as found:
            model.logits(model.forward(inputs, kv))
    return found.names


def test_a_captured_step_of_groups_asks_nothing_on_the_host(tmp_path: Path) -> None:
    def folder(name: str, changes: dict[str, object]) -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(COMMON | LATENT | changes))
        return path

    whole, narrow = folder("whole", {"moe_intermediate_size": 128}), folder("narrow", {"moe_intermediate_size": 32})
    with started(2) as pool:
        for name, mesh in LAYOUTS.items():
            for num_rows in (1, 64):
                assert pool.over(mesh, asked, whole, num_rows) == [set(), set()], f"{name}, {num_rows} rows"
        # 16 columns of an expert are too few for every kernel of a GPU but the reference, which asks.
        assert all(names for names in pool.over(LAYOUTS["experts cut"], asked, narrow, 8))
