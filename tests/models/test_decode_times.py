"""Random weights ask as many experts in a rank that is measured by itself as evenly chosen ones would: fewer would be
read faster, and flatter what is measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.test_make_checkpoint import make
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.selection import Selector
from tokenspeed.models.decode_times import decode_times
from tokenspeed.parallel.alone import Alone
from tokenspeed.parallel.cost import Hardware
from tokenspeed.parallel.mesh import Mesh

NARROW = {
    "hidden_size": 512, "intermediate_size": 128, "moe_intermediate_size": 64, "num_hidden_layers": 5,
    "num_attention_heads": 8, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "vocab_size": 512,
}  # fmt: skip
EXPERTS, TOP_K = 384, 8


OWN = {"attn_dp": 4, "moe_ep": 4}


@pytest.mark.parametrize(("sizes", "rows"), [({}, 32), ({"moe_ep": 4}, 32), (OWN, 8), (OWN, 2)])
def test_as_many_experts_are_asked_as_by_an_even_choice(
    tmp_path: Path, sizes: dict[str, int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    distinct: list[int] = []
    select = Selector.select

    def watched(self: Selector, op: str, target: Target, traits: Traits) -> Kernel:
        kernel = select(self, op, target, traits)
        if op != "moe_route":
            return kernel

        def route(*arguments: Any) -> Any:
            ids, weights = kernel(*arguments)
            assert len(ids) == tokens
            distinct.append(len(ids[:, :TOP_K].unique()))
            return ids, weights

        return route

    monkeypatch.setattr(Selector, "select", watched)
    (tmp_path / "config.json").write_text(json.dumps(make.config_of("k2", "float32", None) | NARROW))
    config = read_model_config(resolve(str(tmp_path), "dummy"))
    world = Alone(Mesh.of(4, **sizes), 0, torch.device("cpu"))
    tokens = rows * world.mesh.size("attn_data")
    with torch.inference_mode():
        (times,) = decode_times(world, config, torch.float32, [(rows, 100)], Hardware())
    assert times.rows == rows and times.predicted.total > times.predicted_alone.total > 0
    # Of K experts a token asks, n tokens that choose evenly ask E (1 − (1 − K/E)^n): 188 of 384 by 32 tokens, 60 by 8.
    expected = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** tokens)
    assert statistics.mean(distinct) == pytest.approx(expected, rel=0.05)
