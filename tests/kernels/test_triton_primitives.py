"""The Triton versions of the small ops and of GQA decode, interpreted on a CPU, and what only they are asked for.

Without a GPU they run in Triton's interpreter, in a process of their own: it must be asked for before triton
is imported. On a GPU the numerics suite runs them on the same cases.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.test_numerics import CASES, Case, Paged, copied, normal, returned, run, worst_error
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.reference.mha_decode import mha_decode as mha_reference
from tokenspeed.kernels.registry import Kernel, Target
from tokenspeed.kernels.selection import default

ELEMENTWISE = ("embedding", "kv_store", "rms_norm", "rotary", "silu_mul")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ROOT = Path(__file__).parents[2]
triton_missing = importlib.util.find_spec("triton") is None


def ragged(lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, block_size: int) -> Case:
    paged = Paged(tuple((1, length) for length in lengths), heads, kv_heads, head_dim, block_size)
    return Case(f"{paged}, lengths {lengths}", paged.traits, paged.decode_arguments, returned)


def decode_cases() -> Iterator[Case]:
    """Rows of length 0 among others, ratios from 1 to 16 and more, tiles that cross blocks, wide and odd heads."""
    yield ragged((0, 130, 1, 0, 64, 65, 0), 8, 2, 64, 16)
    yield ragged((0,), 4, 4, 64, 64)
    yield ragged((200, 0, 63), 16, 1, 80, 48)
    yield ragged((300, 5), 6, 2, 128, 256)
    yield ragged((129,), 20, 1, 16, 64)
    yield ragged((33,) * 5, 3, 3, 256, 128)


def linear_cases() -> Iterator[Case]:
    """Rows, K and weight rows that fill no tile, one token and many, x apart."""
    for tokens, k, n, bias in ((1, 64, 7, False), (2, 200, 33, True), (5, 33, 96, True), (16, 300, 40, False)):

        def arguments(g: torch.Generator, dtype: torch.dtype, t=tokens, k=k, n=n, bias=bias) -> tuple[Any, ...]:
            x = normal(g, dtype, t, k + 8)[:, :k]
            return x, normal(g, dtype, n, k), normal(g, dtype, n) if bias else None

        yield Case(f"{tokens}x{k}x{n}", {}, arguments, returned)


def wanted(op: str, case: Case, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    reference = next(each for each in default().registry.of(op) if each.backend == "reference")
    kernel = reference.bind(Target(Platform("cpu", ""), torch.float64), case.traits)
    return run(kernel, case, copied(arguments, torch.device("cpu"), torch.float64))


def error_of(op: str, kernel: Kernel, case: Case, dtype: torch.dtype, device: str) -> float:
    """Relative error of the worst token against float64; outputs start as NaN."""
    arguments = case.arguments(torch.Generator().manual_seed(len(case.name)), dtype)
    torch.use_deterministic_algorithms(True)
    try:
        results = run(kernel, case, copied(arguments, torch.device(device)))
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = zip(results, wanted(op, case, arguments), strict=True)
    return max(worst_error(result, right) for result, right in pairs)


def test_a_row_without_tokens_gives_zeros_and_changes_no_other() -> None:
    case = ragged((0, 130, 0), 4, 2, 16, 16)
    q, k, v, table, kv_len, kv_lens, scale = case.arguments(torch.Generator().manual_seed(1), torch.float64)
    out = mha_reference(q, k, v, table, kv_len, kv_lens, scale)
    alone = mha_reference(q[1:2], k, v, table[1:2], kv_len[1:2], kv_lens[1:2], scale)
    assert not out[[0, 2]].any()
    torch.testing.assert_close(out[1:2], alone)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", list(decode_cases()), ids=lambda case: case.name)
def test_decode_of_ragged_rows_agrees_on_the_gpu(case: Case, dtype: torch.dtype) -> None:
    target = Target(Platform.of(torch.device("cuda")), dtype)
    kernel = default().select("mha_decode", target, case.traits)
    assert error_of("mha_decode", kernel, case, dtype, "cuda") < TOLERANCE[dtype]


@pytest.mark.skipif(triton_missing or torch.cuda.is_available(), reason="no triton, or a GPU runs the suite")
def test_triton_kernels_interpreted_agree_with_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_triton_primitives"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" ok") > 45, run.stdout


def kernels(op: str, case: Case, dtype: torch.dtype) -> Iterator[Kernel]:
    """What is bound by default, and the ways that it chooses among on a GPU."""
    from tokenspeed.kernels.triton import linear, mha_decode  # noqa: PLC0415 - not before the interpreter is asked for

    if op == "linear":
        yield linear.Linear(linear.VectorConfig(rows=16, block_k=64, held=128))
        if dtype is not torch.float32:
            yield linear.Linear(linear.TensorConfig(rows=32, parts=2, block_k=32, held=64))
            yield linear.Linear(linear.TensorConfig(rows=64, parts=1, block_k=64, held=0))
    elif op == "mha_decode":
        size = int(case.traits["num_heads"]), int(case.traits["num_kv_heads"])
        yield mha_decode.MhaDecode(*size, mha_decode.Config(tma=False, dependent=False, shares=3))
        yield mha_decode.MhaDecode(*size, mha_decode.Config(tma=True, dependent=False, shares=9))
    else:
        name = f"tokenspeed.kernels.triton.{op}"
        yield importlib.import_module(name).bind(Target(Platform("cpu", ""), dtype), case.traits)


def interpreted_cases() -> Iterator[tuple[str, Case, torch.dtype]]:
    """float16 stands for the 16-bit types, once an op: the interpreter multiplies bfloat16 matrices wrongly."""
    for op in ELEMENTWISE:
        few = [case for case in CASES[op]() if int(case.name.split("x")[0].split()[0]) <= 40]
        yield from ((op, case, torch.float32) for case in few)
        yield op, few[-1], torch.float16
    for case in linear_cases():
        yield from (("linear", case, dtype) for dtype in (torch.float32, torch.float16))
    cases = [*decode_cases(), *itertools.islice(CASES["mha_decode"](), 1, 3)]
    yield from (("mha_decode", case, torch.float32) for case in cases)
    yield "mha_decode", cases[0], torch.float16


def interpret() -> int:
    """1 if a case is wrong."""
    wrong = 0
    for op, case, dtype in interpreted_cases():
        for kernel in kernels(op, case, dtype):
            error = error_of(op, kernel, case, dtype, "cpu")
            good = error < TOLERANCE[dtype]
            wrong += not good
            print(f"{op} {case.name} {dtype}: {error:.1e} {'ok' if good else 'WRONG'}", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(interpret())
