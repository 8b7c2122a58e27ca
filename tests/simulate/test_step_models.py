"""Step times against numbers computed by hand from the constants."""

from __future__ import annotations

import pytest

from tokenspeed.batch import BatchLimits, Plan, PlanBuffers
from tokenspeed.simulate.step_models import H100_V2L, STEP_MODELS, RooflineMoE

LIMITS = BatchLimits(max_rows=128, max_tokens=8192, max_blocks=4, block_size=64)

TOY = RooflineMoE(
    name="toy",
    kv_bytes_per_token=10,
    kv_tokens=1_000,
    max_model_len=500,
    shared_weight_bytes=1_000.0,
    routed_weight_bytes=800.0,
    num_experts=4,
    top_k=2,
    linear_flop=30.0,
    attention_flop=2.0,
    bandwidth=100.0,
    flop_rate=50.0,
    prefill_overhead=3.0,
    decode_overhead=0.5,
)


def plan(decode: list[int], prefill: list[tuple[int, int]]) -> Plan:
    """Decode rows by their computed tokens, prefill rows by (computed, new)."""
    buffers = PlanBuffers(LIMITS)
    rows = [(computed, 1) for computed in decode] + prefill
    for index, (computed, new) in enumerate(rows):
        buffers.row_computed[index], buffers.row_new[index] = computed, new
    tokens = sum(new for _, new in rows)
    return Plan(1, buffers, len(rows), len(decode), tokens, 0, len(rows), 0, 0, 0, tokens)


def test_a_decode_step_reads_weights_its_experts_and_the_context() -> None:
    # Weights (1000 + 800 · 2/4) / 100 = 14 s; context (19 + 1) · 10 / 100 = 2 s.
    assert TOY.seconds(plan([19], [])) == pytest.approx(0.5 + 14.0 + 2.0)
    # Two tokens hit 4 · (1 − 1/4) = 3 experts: (1000 + 600) / 100 = 16 s; context (20 + 40) · 10 / 100 = 6 s.
    assert TOY.seconds(plan([19, 39], [])) == pytest.approx(0.5 + 16.0 + 6.0)


def test_a_prefill_computes_its_tokens_and_all_pairs_with_its_context() -> None:
    # 100 tokens · 30 / 50 = 60 s, more than the weights' 18 s; pairs 100 · 40 + 100 · 101 / 2 = 9050, · 2 / 50 = 362 s.
    assert TOY.seconds(plan([], [(40, 100)])) == pytest.approx(3.0 + 60.0 + 362.0)


def test_a_short_prefill_waits_for_the_weights() -> None:
    # One token: 0.6 s of arithmetic but 14 s of weights; one pair.
    assert TOY.seconds(plan([], [(0, 1)])) == pytest.approx(3.0 + 14.0 + 2.0 / 50.0)


def test_a_mixed_step_pays_for_both() -> None:
    # 101 tokens · 30 / 50 = 60.6 s; decode context 20 · 10 / 100 = 2 s; pairs 5050 · 2 / 50 = 202 s.
    assert TOY.seconds(plan([19], [(0, 100)])) == pytest.approx(3.0 + 60.6 + 2.0 + 202.0)


def test_v2l_reads_4_9_gb_for_a_token_and_31_gb_at_most() -> None:
    def weights(tokens: int) -> float:
        routed = H100_V2L.routed_weight_bytes * H100_V2L.distinct_experts(tokens) / H100_V2L.num_experts
        return H100_V2L.shared_weight_bytes + routed

    assert weights(1) == pytest.approx(4.90e9, rel=0.002)
    assert weights(8192) == pytest.approx(31.0e9, rel=0.005)
    assert H100_V2L.distinct_experts(1) == pytest.approx(6.0) and H100_V2L.kv_bytes_per_token == 31_104


@pytest.mark.parametrize(("context", "batch", "measured"), [(1_024, 8, 933), (1_024, 32, 2_474), (50_000, 8, 625)])
def test_v2l_decodes_as_fast_as_engines_measured_on_an_h100(context: int, batch: int, measured: int) -> None:
    assert batch / H100_V2L.seconds(plan([context] * batch, [])) == pytest.approx(measured, rel=0.1)


def test_a_cold_prompt_of_50_000_tokens_takes_about_1_1_seconds_in_chunks_of_8192() -> None:
    chunks = [(start, min(8192, 50_000 - start)) for start in range(0, 50_000, 8192)]
    assert sum(H100_V2L.seconds(plan([], [chunk])) for chunk in chunks) == pytest.approx(1.1, rel=0.03)


def test_models_are_found_by_their_names() -> None:
    assert all(model.name == name for name, model in STEP_MODELS.items()) and "h100-v2l" in STEP_MODELS
