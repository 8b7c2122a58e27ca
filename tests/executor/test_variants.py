"""Whatever a step asks of the device, warming up and capturing have asked for before: nothing compiles in between."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.variants import HOPPER, Variants, recorded
from tokenspeed.batch import BatchLimits
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.executor.device_step import StepOps
from tokenspeed.executor.gpu import GpuExecutor
from tokenspeed.kernels.registry import Target
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.registry import build_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

LIMITS = BatchLimits(max_rows=40, max_tokens=2048, max_blocks=401, block_size=64)
CPU = torch.device("cpu")

COMMON = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_attention_heads": 16,
    "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
}  # fmt: skip
GROUPED = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_attention_heads": 16, "head_dim": 64,
    "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
    "norm_topk_prob": True, "mlp_only_layers": [0], "decoder_sparse_step": 1,
}  # fmt: skip

Row = tuple[int, int]
"""New tokens, and those before them."""


def steps(seed: int, count: int) -> Iterator[tuple[int, list[Row]]]:
    """How many rows decode, and all rows, as a scheduler makes them: decode rows first, chunks cut by the step."""
    draw = random.Random(seed)
    longest = (LIMITS.max_blocks - 1) * LIMITS.block_size
    for _ in range(count):
        num_decode = draw.choice((0, 1, draw.randrange(LIMITS.max_rows)))
        rows = [(1, draw.choice((draw.randint(1, 500), draw.randrange(longest)))) for _ in range(num_decode)]
        left, wanted = LIMITS.max_tokens - num_decode, draw.choice((1, 2, LIMITS.max_rows))
        most = draw.choice((1, 3, 60, 200, 600, LIMITS.max_tokens))
        while left and (not rows[num_decode:] or (len(rows) < LIMITS.max_rows and len(rows) - num_decode < wanted)):
            new = min(left, draw.randint(1, most))
            before = draw.choice((0, draw.randrange(2000), draw.randrange(longest - new)))
            rows.append((new, before))
            left -= new
        yield num_decode, rows


def run(executor: GpuExecutor, num_decode: int, rows: list[Row]) -> None:
    """As `launch` does, of slots whose blocks are all one."""
    plan, step, tables = executor._plan, executor._step, executor._tables
    tables.block_table.zero_()
    tables.state.length.fill_(-1)
    new, before = torch.tensor(rows, dtype=torch.int32).T
    plan.row_slot[: len(rows)] = torch.arange(len(rows))
    plan.row_new[: len(rows)], plan.row_computed[: len(rows)] = new, before
    samples = executor._graphs.size(len(rows))
    step.prefill(num_decode, tuple(new.tolist()), tuple((new + before).tolist()), samples)
    step.head(samples)


def started(folder: Path, settings: dict[str, object], variants: Variants) -> GpuExecutor:
    (folder / "config.json").write_text(json.dumps(COMMON | settings))
    ctx = BuildContext.of(device=CPU, dtype=torch.bfloat16, max_positions=32768, block_size=LIMITS.block_size)
    ctx = dataclasses.replace(ctx, target=Target(HOPPER, torch.bfloat16))
    from tokenspeed.kernels.library.mla_prefill import MlaPrefill  # noqa: PLC0415 - where triton is

    model = build_model(read_model_config(resolve(str(folder), "dummy")), ctx)
    for module in model.modules():
        prefill = vars(module).get("_prefill")
        if isinstance(prefill, MlaPrefill):
            prefill.attention = variants.planned
    kv = [
        tuple(torch.zeros(1, LIMITS.block_size, *shape, dtype=torch.bfloat16) for _, shape in spec.tensors)
        for spec in model.kv_spec
    ]
    return GpuExecutor(model, kv, limits=LIMITS, vocab_size=512, step_ops=StepOps.of(ctx.target), device=CPU)


@pytest.mark.parametrize("settings", [LATENT, GROUPED], ids=["latent", "grouped"])
@torch.inference_mode()
def test_no_step_meets_a_kernel_or_a_plan_that_warming_up_has_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_500)
    with recorded() as variants:
        executor = started(tmp_path, settings, variants)
        executor.warm_up()
        for size in executor._graphs._sizes:
            executor._graphs.decode(size)
            executor._graphs.head(size)
        assert variants.take()
        for num_decode, rows in steps(seed=3, count=40):
            run(executor, num_decode, rows)
            assert not variants.take(), f"{num_decode} of {rows} decode"
        executor.close()
