"""Rotary frequencies and tables equal those of `transformers`, scaled or not."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tokenspeed.errors import CheckpointError
from tokenspeed.layers.rotary import Rope, RotaryTable

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 8.0, "original_max_position_embeddings": 2500, "beta_fast": 24, "beta_slow": 2}
KINDS: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default", "rope_theta": 100000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN},
    "yarn of equal mscales": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn of two mscales": {"rope_type": "yarn", "rope_theta": 50000.0, **YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn of its own magnitude": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN, "attention_factor": 1.5},
    "yarn between whole indices": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN, "truncate": False},
}
LENGTH = 20_000


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_table_equals_transformers(kind: str, head_dim: int) -> None:
    config = LlamaConfig(head_dim=head_dim, rope_parameters=KINDS[kind], max_position_embeddings=LENGTH)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(LENGTH)[None])
    rope = Rope.from_hf({"rope_parameters": KINDS[kind]}, head_dim, "config.json")
    table = RotaryTable(rope, head_dim, LENGTH, torch.device("cpu")).cos_sin
    assert table.shape == (LENGTH, head_dim) and table.dtype == torch.float32
    half = head_dim // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=1e-5)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=0, atol=1e-5)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones() -> None:
    scaled = Rope.from_hf({"rope_parameters": KINDS["llama3"]}, 128, "config.json").frequencies(128)
    plain = Rope(500000.0, None).frequencies(128)
    ratio = plain / scaled
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(8.0)
    assert ((ratio > 1.01) & (ratio < 7.9)).any()


def test_divisors_must_fit_the_head() -> None:
    fields = {"rope_scaling": {"rope_type": "divisors", "divisors": [1.0] * 31}}
    with pytest.raises(CheckpointError, match="31 values, a head needs 32"):
        Rope.from_hf(fields, 64, "model.gguf")


def test_yarn_keeps_short_waves_and_stretches_long_ones() -> None:
    ratio = Rope(10000.0, None).frequencies(64) / Rope.from_hf(
        {"rope_parameters": KINDS["yarn"]}, 64, "config.json"
    ).frequencies(64)
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(8.0)
    assert ((ratio > 1.01) & (ratio < 7.9)).any()


def test_yarn_scales_the_softmax_only_where_mscale_all_dim_asks_for_it() -> None:
    def softmax_scale(kind: str) -> float:
        return Rope.from_hf({"rope_parameters": KINDS[kind]}, 64, "config.json").softmax_scale

    assert softmax_scale("yarn") == softmax_scale("default") == 1.0
    assert softmax_scale("yarn of equal mscales") == pytest.approx((0.1 * math.log(8) + 1) ** 2)


@pytest.mark.parametrize("name", ["factor", "original_max_position_embeddings", "beta_fast", "mscale"])
def test_a_field_of_yarn_that_is_no_positive_number_is_named(name: str) -> None:
    fields = {"rope_scaling": {"type": "yarn", **YARN, name: -1}}
    with pytest.raises(CheckpointError, match=f"config.json: rope_scaling.{name}.* must be a positive number, got -1"):
        Rope.from_hf(fields, 64, "config.json")


def test_rotating_part_of_a_head_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor 0\.5 is not supported"):
        Rope.from_hf({"partial_rotary_factor": 0.5}, 64, "config.json")
