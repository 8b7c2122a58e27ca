"""Rotary frequencies and tables equal those of `transformers`, scaled or not."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tokenspeed.errors import CheckpointError
from tokenspeed.layers.rotary import Rope, RotaryTable

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
KINDS: dict[str, dict[str, object]] = {
    "default": {"rope_type": "default", "rope_theta": 100000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
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
