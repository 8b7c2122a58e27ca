"""What a rank of four holds of real shapes has a kernel of a GPU: a reference waits for the device, which no CUDA graph
can hold."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_make_checkpoint import make
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.kernels import ops
from tokenspeed.kernels.platform import NVIDIA_LEVELS, Platform
from tokenspeed.kernels.registry import Kernel, Target, TraitValue
from tokenspeed.kernels.selection import default
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.registry import make_model
from tokenspeed.parallel.mesh import Mesh

HOPPER = Platform("nvidia", "sm90", frozenset(f"sm{level}" for level in NVIDIA_LEVELS if level <= 90))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("sizes", [{}, {"moe_ep": 4}, {"attn_dp": 4, "moe_ep": 4}])
@pytest.mark.parametrize("preset", ["v2l", "k2"])
def test_no_op_of_a_rank_is_left_to_its_reference(
    tmp_path: Path, preset: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: dict[str, set[str]] = {}

    def select(op: str, target: Target, **traits: TraitValue) -> Kernel:
        explanation = default().choose(op, target, traits)
        assert explanation.chosen is not None
        chosen.setdefault(explanation.chosen.backend, set()).add(op)
        return lambda *arguments: None

    monkeypatch.setattr(ops, "select", select)
    assert make.main([preset, str(tmp_path), "--config-only", "--layers", "2"]) == 0
    ctx = BuildContext.of(
        device=torch.device("meta"), dtype=torch.bfloat16, max_positions=16, block_size=64, mesh=Mesh.of(4, **sizes)
    )
    ctx = dataclasses.replace(ctx, target=Target(HOPPER, torch.bfloat16))
    make_model(read_model_config(resolve(str(tmp_path), "dummy")), ctx)
    assert "reference" not in chosen, chosen["reference"]
    assert "moe_experts" in set().union(*chosen.values())
