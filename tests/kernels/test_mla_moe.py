"""MLA and MoE: the references against independent sums, and the Triton kernels, on a GPU or interpreted.

Without a GPU the kernels run in Triton's interpreter, in a process of their own: it must be asked for
before triton is imported.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.mla_moe_cases import MLA_MOE_CASES, Made, latent_cache
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.reference.mla_decode import mla_decode
from tokenspeed.kernels.reference.mla_prefill import mla_prefill
from tokenspeed.kernels.reference.moe_experts import moe_experts
from tokenspeed.kernels.reference.moe_route import Route
from tokenspeed.kernels.registry import Kernel, Target
from tokenspeed.kernels.selection import default

HERE = Path(__file__).parent


def test_decode_is_the_softmax_written_out() -> None:
    g = torch.Generator().manual_seed(1)
    cache, table, kv_len = latent_cache(g, torch.float64, [37, 0, 16], 16, 12)
    q = torch.randn(3, 2, 2, 12, generator=g, dtype=torch.float64)
    out = mla_decode(q[..., :8], q[..., 8:], cache, table, kv_len, 0.3)
    for row, query, head in itertools.product(range(3), range(2), range(2)):
        seen = int(kv_len[row]) - 1 + query
        if seen < 1:
            assert not out[row, query, head].any()
            continue
        keys = [cache[table[row, j // 16], j % 16] for j in range(seen)]
        scores = [0.3 * float(key @ q[row, query, head]) for key in keys]
        peak = max(scores)
        weights = [math.exp(score - peak) for score in scores]
        wanted = sum(weight * key[:8] for weight, key in zip(weights, keys, strict=True)) / sum(weights)
        torch.testing.assert_close(out[row, query, head], wanted)


def test_absorbed_decode_equals_expanded_prefill() -> None:
    g = torch.Generator().manual_seed(2)
    cache, table, kv_len = latent_cache(g, torch.float64, [50, 9], 16, 24)
    q = torch.randn(2, 4, 3, 10 + 8, generator=g, dtype=torch.float64)
    k_up, v_up = (torch.randn(3, dim, 16, generator=g, dtype=torch.float64) for dim in (10, 7))
    start = torch.tensor([0, 4, 8], dtype=torch.int32)
    expanded = mla_prefill(q.flatten(0, 1), cache, table, start, kv_len, (4, 4), (50, 9), k_up, v_up, 0.2)
    absorbed = torch.einsum("rqhn,hnc->rqhc", q[..., :10], k_up)
    latent = mla_decode(absorbed, q[..., 10:], cache, table, kv_len, 0.2)
    torch.testing.assert_close(torch.einsum("rqhc,hvc->rqhv", latent, v_up).flatten(0, 1), expanded)


def test_a_prompt_in_chunks_gives_what_it_gives_at_once() -> None:
    g = torch.Generator().manual_seed(3)
    cache, table, _ = latent_cache(g, torch.float64, [50], 16, 24)
    q = torch.randn(50, 3, 10 + 8, generator=g, dtype=torch.float64)
    ups = [torch.randn(3, dim, 16, generator=g, dtype=torch.float64) for dim in (10, 7)]

    def prefill(first: int, last: int) -> torch.Tensor:
        start, length = torch.tensor([0, last - first], dtype=torch.int32), torch.tensor([last], dtype=torch.int32)
        return mla_prefill(q[first:last], cache, table, start, length, (last - first,), (last,), *ups, 0.2)

    torch.testing.assert_close(torch.cat([prefill(0, 7), prefill(7, 33), prefill(33, 50)]), prefill(0, 50))


def route(**traits: int | bool | str) -> Route:
    return Route({"num_shared": 0, "num_groups": 1, "top_groups": 1, "normalise": False, **traits})


def test_a_group_that_is_not_chosen_gives_no_expert() -> None:
    logits = torch.tensor([[5.0, -9.0, 3.0, 3.1, 1.0, 1.0]])
    by_sum = route(scoring="sigmoid", num_experts=6, top_k=2, num_groups=3, top_groups=1)
    by_max = route(scoring="softmax", num_experts=6, top_k=2, num_groups=3, top_groups=1)
    assert by_sum(logits, None, 1.0)[0].tolist() == [[3, 2]]
    assert by_max(logits, None, 1.0)[0].tolist() == [[0, 1]]


def test_the_bias_chooses_but_does_not_weigh() -> None:
    logits, bias = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([-9.0, 0.0, 9.0])
    ids, weights = route(scoring="sigmoid", num_experts=3, top_k=2)(logits, bias, 2.0)
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, 2 * torch.tensor([[0.0, 1.0]]).sigmoid())


def test_normalised_weights_sum_to_the_scale_and_shared_experts_follow() -> None:
    ids, weights = route(scoring="softmax", num_experts=9, top_k=4, num_shared=2, normalise=True)(
        torch.randn(5, 9), None, 2.5, torch.tensor([3], dtype=torch.int32)
    )
    torch.testing.assert_close(weights[:3, :4].sum(1), torch.full((3,), 2.5))
    assert ids[:3, 4:].tolist() == [[9, 10]] * 3
    assert bool((weights[:3, 4:] == 1).all())
    assert bool((ids[3:] == -1).all())
    assert not weights[3:].any()


def test_experts_are_the_sum_written_out() -> None:
    g = torch.Generator().manual_seed(4)
    x, gate_up, down = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3, 6), (4, 10, 6), (4, 6, 5)))
    ids = torch.tensor([[0, 3], [2, -1], [-1, -1]], dtype=torch.int32)
    weights = torch.rand(3, 2, generator=g, dtype=torch.float64)
    out = moe_experts(x, gate_up, down, ids, weights)
    for token in range(3):
        wanted = torch.zeros(6, dtype=torch.float64)
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            if expert >= 0:
                gate, up = gate_up[expert, :5] @ x[token], gate_up[expert, 5:] @ x[token]
                wanted += weight * (down[expert] @ (gate / (1 + torch.exp(-gate)) * up))
        torch.testing.assert_close(out[token], wanted)


def triton_missing() -> str:
    return "" if importlib.util.find_spec("triton") else "triton is not installed"


@pytest.mark.skipif(bool(triton_missing()) or torch.cuda.is_available(), reason="no triton, or a GPU runs the suite")
def test_triton_kernels_interpreted_agree_with_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.test_mla_moe"],
        cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count(" ok") > 30, run.stdout


def agrees(op: str, kernel: Kernel, seed: int, case: Made, dtype: torch.dtype) -> bool:
    """Print how far a kernel is from the reference in float64 on one case; outputs start as NaN."""
    name, traits, arguments, results = case
    given = arguments(torch.Generator().manual_seed(seed), dtype)
    wide = [each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in given]
    reference = next(each for each in default().registry.of(op) if each.backend == "reference")
    wanted = reference.bind(Target(Platform("cpu", ""), torch.float64), traits)(*wide)
    torch.use_deterministic_algorithms(True)
    value = kernel(*given)
    torch.use_deterministic_algorithms(False)
    (result,), (correct,) = results(given, value), results(tuple(wide), wanted)
    result, correct = result.double().flatten(1), correct.flatten(1)
    error = float(((result - correct).norm(dim=1) / correct.norm(dim=1).clamp_min(1e-30)).max())
    good = bool(result.isfinite().all()) and error < (1e-5 if dtype is torch.float32 else 3e-3)
    print(f"{op} {name} {dtype}: {error:.1e} {'ok' if good else 'WRONG'}")
    return good


def interpret() -> int:
    """Every case, with copy descriptors and without, with few programs and with more than tiles; 1 if one is wrong.

    float16 stands for the 16-bit types: Triton's interpreter multiplies bfloat16 matrices wrongly.
    """
    from tokenspeed.kernels.triton import mla_decode as mla  # noqa: PLC0415 - not before the interpreter is asked for
    from tokenspeed.kernels.triton import moe_experts as moe  # noqa: PLC0415
    from tokenspeed.kernels.triton import moe_route  # noqa: PLC0415

    def kernels(op: str, traits: dict[str, Any]) -> list[Kernel]:
        if op == "mla_decode":
            size = traits["kv_lora_rank"], traits["rope_dim"]
            return [mla.MlaDecode(*size, mla.Config(tma=t, shares=s, dependent=False)) for t, s in ((0, 3), (1, 9))]
        if op == "moe_route":
            return [moe_route.Route(traits)]
        ways = ((64, False), (0, False), (0, True))
        return [moe.MoeExperts(traits["num_shared"], moe.Config(r, 32, 32, tma=t, dependent=False)) for r, t in ways]

    wrong = 0
    for op, dtype in itertools.product(("mla_decode", "moe_route", "moe_experts"), (torch.float32, torch.float16)):
        for seed, case in enumerate(MLA_MOE_CASES[op]()):
            too_large = case[1].get("kv_lora_rank", 0) > 64  # minutes in the interpreter
            if not too_large and (dtype is torch.float32 or seed == 0):
                wrong += sum(not agrees(op, kernel, seed, case, dtype) for kernel in kernels(op, case[1]))
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(interpret())
