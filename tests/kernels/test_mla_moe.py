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

import pytest
import torch

from tests.kernels.mla_moe_cases import MLA_MOE_CASES, latent_cache
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.reference.mla_decode import mla_decode
from tokenspeed.kernels.reference.mla_prefill import mla_prefill
from tokenspeed.kernels.reference.moe_experts import moe_experts
from tokenspeed.kernels.reference.moe_route import Route
from tokenspeed.kernels.registry import Target

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
    assert run.stdout.count(" ok") >= 4 * len(MLA_MOE_CASES), run.stdout


def interpret() -> int:
    """Every case, copy-descriptor and few-programs variants too, with memory from torch.empty NaN; 1 if any is wrong."""
    from tokenspeed.kernels.triton import mla_decode as mla  # noqa: PLC0415 - not before the interpreter is asked for
    from tokenspeed.kernels.triton import moe_experts as moe  # noqa: PLC0415
    from tokenspeed.kernels.triton import moe_route  # noqa: PLC0415

    plain = {"dependent": False}
    wrong = 0
    for op, dtype in itertools.product(("mla_decode", "moe_route", "moe_experts"), (torch.float32, torch.float16)):
        for seed, (name, traits, arguments, results) in enumerate(MLA_MOE_CASES[op]()):
            given = arguments(torch.Generator().manual_seed(seed), dtype)
            wide = tuple(
                each.double() if isinstance(each, torch.Tensor) and each.is_floating_point() else each for each in given
            )
            target = Target(Platform("cpu", ""), dtype)
            if op == "mla_decode":
                wanted, size = mla_decode(*wide), (traits["kv_lora_rank"], traits["rope_dim"])
                kernels = [mla.MlaDecode(*size, mla.Config(tma=t, shares=s, **plain)) for t, s in ((0, 3), (1, 40))]
            elif op == "moe_route":
                wanted, kernels = Route(traits)(*wide), [moe_route.bind(target, traits)]
            else:
                wanted, shared = moe_experts(*wide), traits["num_shared"]
                kernels = [
                    moe.MoeExperts(shared, moe.Config(rows_up_to=r, tma=t, **plain))
                    for r, t in ((64, 0), (0, 0), (0, 1))
                ]
            for kernel in kernels:
                torch.use_deterministic_algorithms(True)
                value = kernel(*given)
                torch.use_deterministic_algorithms(False)
                (result,), (reference,) = results(given, value), results(wide, wanted)
                result, reference = result.double().flatten(1), reference.flatten(1)
                error = ((result - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-30)).max()
                good = bool(result.isfinite().all()) and float(error) < (1e-5 if dtype is torch.float32 else 3e-3)
                wrong += not good
                print(f"{op} {name} {dtype}: {float(error):.1e} {'ok' if good else 'WRONG'}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(interpret())
