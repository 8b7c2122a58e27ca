"""The Llama family gives the logits of `transformers`, however the tokens are cut into steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.models.paged import PagedModel
from tests.models.reference import LENGTH, checkpoint, error, expected, tokens
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import load_weights
from tokenspeed.errors import CheckpointError, ConfigError
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.llama import LlamaForCausalLM
from tokenspeed.models.registry import build_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, object]] = {
    "no-grouping": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None, "hidden_size": 48},
    "groups-of-3": {"num_attention_heads": 6, "num_key_value_heads": 2},
    "groups-of-8-tied": {"num_attention_heads": 8, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama3-rope": {"rope_parameters": LLAMA3},
    "linear-rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "wide-heads": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
BLOCK = 16
TOLERANCE = 1e-4


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PagedModel:
    source = resolve(str(folder))
    ctx = BuildContext.of(device=torch.device("cpu"), dtype=dtype, max_positions=256, block_size=BLOCK)
    model = build_model(read_model_config(source), ctx)
    load_weights(model, source)
    return PagedModel(model, block_size=BLOCK, dtype=dtype)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_however_tokens_are_cut(tmp_path: Path, variant: str) -> None:
    reference = checkpoint(tmp_path, **VARIANTS[variant])
    model = load(tmp_path)
    a, b, c = tokens(1), tokens(2), tokens(3, 40)
    want_a, want_b, want_c = (expected(reference, ids) for ids in (a, b, c))

    (whole,) = model.step([("whole", a)])
    assert error(whole, want_a) < TOLERANCE

    chunked: list[torch.Tensor] = []
    at = 0
    for size in (7, 13, 2, 31, 22):
        # Another sequence decodes in the same pass, and a third one prefills in it.
        others = [("c", [c[len(chunked)]])]
        tail = [(f"fresh{size}", b[:size])]
        got = model.step([*others, ("a", a[at : at + size]), *tail])
        assert error(got[0], want_c[len(chunked)][None]) < TOLERANCE
        assert error(got[2], want_b[:size]) < TOLERANCE
        chunked.append(got[1])
        at += size
    assert at == LENGTH
    assert error(torch.cat(chunked), want_a) < TOLERANCE

    model.step([("b", b[:40])])
    for i in range(5, 40):
        rows = [("c", [c[i]]), ("b", [b[35 + i]])]
        got_c, got_b = model.step(rows)
        assert error(got_c, want_c[i][None]) < TOLERANCE
        assert error(got_b, want_b[35 + i][None]) < TOLERANCE


def test_sharded_safetensors_load(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ids = tokens(4)
    assert error(load(tmp_path).step([("a", ids)])[0], expected(reference, ids)) < TOLERANCE


def test_older_configuration_names_mean_the_same(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, rope_parameters=LLAMA3)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))
    ids = tokens(4)
    assert error(load(tmp_path).step([("a", ids)])[0], expected(reference, ids)) < TOLERANCE


def test_bfloat16_agrees_with_float32_on_most_tokens(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path)
    ids = tokens(6)
    want = expected(reference, ids)
    got = load(tmp_path, torch.bfloat16).step([("a", ids)])[0]
    theirs = expected(reference.to(torch.bfloat16), ids).float()
    assert got.dtype == torch.float32
    assert error(got, want) < 1.5 * error(theirs, want), "as far off as the same model in bfloat16 elsewhere"
    assert (got.argmax(-1) == want.argmax(-1)).float().mean() > 0.85


def _wrong_scale(model: LlamaForCausalLM) -> None:
    model.layers[1].self_attn.attention.scale *= 1.02


def _wrong_rotary_scale(model: LlamaForCausalLM) -> None:
    for layer in model.layers:
        layer.self_attn.attention.cos_sin = layer.self_attn.attention.cos_sin[::2].contiguous()


def _wrong_rotary_pairing(model: LlamaForCausalLM) -> None:
    weight = model.layers[1].self_attn.qkv_proj.weight
    head = weight[:16].clone()
    weight[:16] = head.view(8, 2, -1).transpose(0, 1).reshape(16, -1)


def _missing_bias(model: LlamaForCausalLM) -> None:
    bias = model.layers[2].self_attn.qkv_proj.bias
    assert bias is not None
    bias.zero_()


def _swapped_gate(model: LlamaForCausalLM) -> None:
    weight = model.layers[0].mlp.gate_up_proj.weight
    weight.copy_(weight.roll(weight.shape[0] // 2, 0))


@pytest.mark.parametrize(
    "plant", [_wrong_scale, _wrong_rotary_scale, _wrong_rotary_pairing, _missing_bias, _swapped_gate]
)
def test_the_comparison_notices_a_planted_fault(tmp_path: Path, plant: object) -> None:
    reference = checkpoint(tmp_path, attention_bias=True)
    ids = tokens(1)
    model = load(tmp_path)
    want = expected(reference, ids)
    assert error(model.step([("sound", ids)])[0], want) < TOLERANCE
    with torch.no_grad():
        plant(model.model)  # type: ignore[operator]
    assert error(model.step([("faulty", ids)])[0], want) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": "false"}, "attention_bias"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "original_max_pos"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "factor"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1}}, "rope_theta"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_parameters": 5}, "rope"),
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported (supported: LlamaForCausalLM"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_one_line(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    fields: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
    (tmp_path / "config.json").write_text(json.dumps(fields | change))
    (tmp_path / "model.safetensors").write_bytes(b"")
    ctx = BuildContext.of(device=torch.device("cpu"), dtype=torch.float32, max_positions=64, block_size=BLOCK)
    with pytest.raises(CheckpointError) as failure:
        build_model(read_model_config(resolve(str(tmp_path))), ctx)
    message = str(failure.value)
    assert named in message and "config.json" in message and "\n" not in message


def test_a_model_too_large_for_the_machine_is_one_line(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"hidden_size": 1 << 20, "vocab_size": 1 << 24}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"no memory for (model\.embed_tokens|lm_head): \[16777216, 1048576\]"):
        load(tmp_path)
