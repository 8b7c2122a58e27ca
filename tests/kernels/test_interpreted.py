"""The Triton kernels on a CPU, in Triton's interpreter: each against the reference, in every way that it works.

The interpreter must be asked for before triton is imported, hence a process of its own. On a GPU the numerics suite
runs the compiled kernels on the same cases, and more.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tokenspeed.kernels.numerics.suite import INTERPRETED, Trial, trials
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Kernel, Target
from tokenspeed.kernels.selection import default

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.float16)
"""float16 stands for the 16-bit types: the interpreter multiplies bfloat16 matrices wrongly."""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the suite")
def test_interpreted_triton_kernels_agree_with_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "tests.kernels.test_interpreted"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ran = {line.split("=")[0] for line in done.stdout.splitlines()}
    assert ran == {each.op for each in default().registry.all() if each.backend == "triton"}


def attention_of_a_part(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """What cuDNN is asked for: outputs [B,S,H,V] and the log-sum-exp [B,H,S] of the scores."""
    scores = torch.einsum("bshd,bthd->bhst", q.float(), k.float()) * scale
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).tril() == 0, float("-inf"))
    out = torch.einsum("bhst,bthv->bshv", scores.softmax(3), v.float())
    return out.to(q.dtype).contiguous(), scores.logsumexp(3)


def ways(trial: Trial) -> Iterator[Kernel]:
    """The ways that an op chooses among on a GPU: copy descriptors or loads, few programs or more than there are
    tiles, tensor cores or not, a context in one piece or several, tokens sorted by expert or not."""
    # Not before the interpreter is asked for.
    from tokenspeed.kernels.library import mla_prefill as in_pieces  # noqa: PLC0415
    from tokenspeed.kernels.library import moe_experts as sorted_experts  # noqa: PLC0415
    from tokenspeed.kernels.triton import linear, mha_decode, mla_decode, mla_prefill, moe_experts  # noqa: PLC0415

    traits = trial.case.traits
    match trial.implementation.op:
        case "linear" if trial.index % 7 == 0:  # of the many cases: a product takes most of a second here
            yield linear.Linear(linear.VectorConfig(rows=16, block_k=64, held=128))
            if trial.dtype is not torch.float32:
                yield linear.Linear(linear.TensorConfig(rows=32, parts=2, block_k=32, held=64))
                yield linear.Linear(linear.TensorConfig(rows=64, parts=1, block_k=64, held=0))
        case "mha_decode" if trial.dtype is torch.float32:
            heads = int(traits["num_heads"]), int(traits["num_kv_heads"])
            yield mha_decode.MhaDecode(*heads, mha_decode.Config(tma=False, dependent=False, shares=3))
            yield mha_decode.MhaDecode(*heads, mha_decode.Config(tma=True, dependent=False, shares=9))
        case "mla_decode" if trial.dtype is torch.float32:
            size = int(traits["kv_lora_rank"]), int(traits["rope_dim"])
            yield mla_decode.MlaDecode(*size, mla_decode.Config(tma=False, shares=3, dependent=False))
            yield mla_decode.MlaDecode(*size, mla_decode.Config(tma=True, shares=9, dependent=False))
        case "mla_prefill":
            target = Target(Platform.of(trial.device), trial.dtype)
            for absorbed, workspace in ((0, 128 << 20), (0, 16 << 10), (5, 2 << 10)):
                config = mla_prefill.Config(absorbed, block_m=16, stages=1, warps=4, workspace=workspace)
                yield mla_prefill.MlaPrefill(target, traits, config)
            yield in_pieces.MlaPrefill(target, traits, in_pieces.Lengths(32, (32, 64), 8), attention_of_a_part, config)
        case "moe_experts":
            for rows, tma in ((64, False), (0, False), (0, True)):
                config = moe_experts.Config(rows, 32, 32, tma=tma, dependent=False)
                yield moe_experts.MoeExperts(int(traits["num_shared"]), config)
            yield sorted_experts.MoeExperts(int(traits["num_shared"]), many=1)


def interpret(largest: int) -> int:
    """Print the error of every trial on a case of at most so many elements; 1 if one is too large."""
    wrong = 0
    for trial in trials(default(), [torch.device("cpu")], dtypes=DTYPES, interpreted=largest):
        if trial.implementation.variant == "interpreter":
            kernels = [trial.kernel(), *ways(trial)]
            errors = [trial.error(kernel) for kernel in kernels]
            good = max(errors) < trial.tolerance
            wrong += not good
            print(f"{trial}: {' '.join(f'{error:.1e}' for error in errors)}{'' if good else ' WRONG'}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(interpret(int(sys.argv[1]) if sys.argv[1:] else INTERPRETED))
