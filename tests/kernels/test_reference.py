"""The references against sums written out: what the numerics suite compares every implementation with."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tokenspeed.kernels.numerics.attention_cases import paged_cache, ragged
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.reference.mha_decode import mha_decode
from tokenspeed.kernels.reference.mla_decode import mla_decode
from tokenspeed.kernels.reference.mla_prefill import mla_prefill
from tokenspeed.kernels.reference.moe_experts import moe_experts
from tokenspeed.kernels.reference.moe_route import Route
from tokenspeed.kernels.reference.quantise import bind as quantise
from tokenspeed.kernels.registry import Target


def latent_cache(g: torch.Generator, lengths: list[int], size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *paged_cache(g, torch.float64, lengths, 16, size), torch.tensor(lengths, dtype=torch.int32)


def test_a_row_without_tokens_gives_zeros_and_changes_no_other() -> None:
    case = ragged((0, 130, 0), 4, 2, 16, 16)
    q, k, v, table, kv_len, kv_lens, scale = case.arguments(torch.Generator().manual_seed(1), torch.float64)
    out = mha_decode(q, k, v, table, kv_len, kv_lens, scale)
    alone = mha_decode(q[1:2], k, v, table[1:2], kv_len[1:2], kv_lens[1:2], scale)
    assert not out[[0, 2]].any()
    torch.testing.assert_close(out[1:2], alone)


def test_latent_decode_is_the_softmax_written_out() -> None:
    g = torch.Generator().manual_seed(1)
    cache, table, kv_len = latent_cache(g, [37, 0, 16], 12)
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
    cache, table, kv_len = latent_cache(g, [50, 9], 24)
    q = torch.randn(2, 4, 3, 10 + 8, generator=g, dtype=torch.float64)
    k_up, v_up = (torch.randn(3, dim, 16, generator=g, dtype=torch.float64) for dim in (10, 7))
    start = torch.tensor([0, 4, 8], dtype=torch.int32)
    expanded = mla_prefill(q.flatten(0, 1), cache, table, start, kv_len, (4, 4), (50, 9), k_up, v_up, 0.2)
    absorbed = torch.einsum("rqhn,hnc->rqhc", q[..., :10], k_up)
    latent = mla_decode(absorbed, q[..., 10:], cache, table, kv_len, 0.2)
    torch.testing.assert_close(torch.einsum("rqhc,hvc->rqhv", latent, v_up).flatten(0, 1), expanded)


def test_a_prompt_in_chunks_gives_what_it_gives_at_once() -> None:
    g = torch.Generator().manual_seed(3)
    cache, table, _ = latent_cache(g, [50], 24)
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


@pytest.mark.parametrize(("form", "largest"), [("fp8", 448.0), ("int8", 127.0)])
def test_quantised_blocks_have_their_largest_number_at_the_end_of_the_format(form: str, largest: float) -> None:
    x = torch.randn(7, 80, generator=torch.Generator().manual_seed(5))
    x[2, :32] = 0
    values, scales = quantise(Target(Platform("cpu", ""), torch.float32), {"form": form, "block": 32})(x)
    assert values.shape == x.shape and scales.shape == (7, 3) and scales[2, 0] == 0
    for token, block in itertools.product(range(7), range(3)):
        number, part = (each[token, 32 * block : 32 * block + 32].float() for each in (values, x))
        assert number.abs().max() == (largest if scales[token, block] else 0)
        # fp8 e4m3 has three bits behind the first: half a step is a sixteenth of the number, below 2^-6 of 2^-10.
        room = number.abs().clamp(min=2**-6) / 16 if form == "fp8" else torch.full_like(number, 0.5)
        assert ((number * scales[token, block] - part).abs() <= room * scales[token, block] * 1.001).all()
