"""Quantised safetensors load as the numbers they mean: fp8 in blocks (DeepSeek V3), packed int4 (Kimi K2)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from tests.models.families import FAMILIES, write
from tests.models.paged import PagedModel
from tests.models.reference import error, expected, tokens
from tokenspeed.checkpoint.config import read_folder_quantisation, read_model_config
from tokenspeed.checkpoint.quantisation import PackedInt4
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import iterate_weights, load_weights
from tokenspeed.errors import CheckpointError
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.registry import build_model

FILE = "model.safetensors"
BLOCK = 16
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "input_activations": None,
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*"],
}

Tensors = dict[str, torch.Tensor]
Quantise = Callable[[Tensors, str], None]


def fp8(rows: int, columns: int) -> Quantise:
    """Replace a weight by its fp8 form, block after block; the weight becomes what that form means."""

    def quantise(stored: Tensors, name: str) -> None:
        weight = stored[name].clone()
        height, width = weight.shape
        values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        scales = torch.empty(-(-height // rows), -(-width // columns))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
                scales[i, j] = weight[at].abs().max() / 448
                values[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
                weight[at] = values[at].float() * scales[i, j]
        stored[name], stored[f"{name}_scale_inv"] = values, scales
        stored[f"meant {name}"] = weight

    return quantise


def int4(stored: Tensors, name: str) -> None:
    """Replace a weight by eight numbers of 4 bits in each int32 and a bfloat16 factor for each 32."""
    weight = stored.pop(name)
    height, width = weight.shape
    groups = weight.view(height, -1, 32)
    scales = (groups.abs().amax(-1) / 7).bfloat16()
    numbers = (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7).to(torch.int64)
    stored[f"meant {name}"] = (numbers * scales.float().unsqueeze(-1)).view(height, width)
    words = torch.zeros(height, width // 8, dtype=torch.int64)
    flat = numbers.view(height, width) + 8
    for place in range(8):
        words += flat[:, place::8] << (4 * place)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words)
    stored[f"{name}_packed"], stored[f"{name}_scale"] = words.to(torch.int32), scales
    stored[f"{name}_shape"] = torch.tensor([height, width])


def quantised(folder: Path, name: str, config: dict[str, object], quantise: Quantise, chosen: str) -> Path:
    """A checkpoint whose weights with `chosen` in their name are quantised; returns a plain one of the same meaning."""
    write(folder, name, hidden_size=96, moe_intermediate_size=64)
    stored = load_file(folder / FILE)
    for key in list(stored):
        if chosen in key and stored[key].dim() == 2:
            quantise(stored, key)
    meant = {key.removeprefix("meant "): stored.pop(key) for key in list(stored) if key.startswith("meant ")}
    assert len(meant) > 20
    plain = folder / "plain"
    plain.mkdir()
    untouched = {key: tensor for key, tensor in stored.items() if key.split("weight")[0] + "weight" not in meant}
    save_file(untouched | meant, plain / FILE)
    (plain / "config.json").write_text((folder / "config.json").read_text())
    save_file(stored, folder / FILE)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    return plain


def loaded(folder: Path) -> PagedModel:
    source = resolve(str(folder))
    ctx = BuildContext.of(device=torch.device("cpu"), dtype=torch.float32, max_positions=128, block_size=BLOCK)
    model = build_model(read_model_config(source), ctx)
    load_weights(model, source)
    return PagedModel(model, block_size=BLOCK, dtype=torch.float32)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
CASES = {
    "fp8 blocks of 128": ("deepseek-v3", FP8, fp8(128, 128), "proj"),
    "fp8 ragged blocks": ("deepseek-v3", FP8 | {"weight_block_size": [24, 40]}, fp8(24, 40), "proj"),
    "int4 experts": ("kimi-k2", INT4, int4, ".experts."),
}


@pytest.mark.parametrize("case", CASES)
def test_a_quantised_checkpoint_gives_the_logits_of_what_it_means(tmp_path: Path, case: str) -> None:
    name, config, quantise, chosen = CASES[case]
    plain = quantised(tmp_path, name, config, quantise, chosen)
    assert read_model_config(resolve(str(tmp_path))).dtype == "quantised"
    for (ours, value), (theirs, meant) in zip(
        sorted(iterate_weights(resolve(str(tmp_path)))), sorted(iterate_weights(resolve(str(plain)))), strict=True
    ):
        assert ours == theirs
        torch.testing.assert_close(value, meant, rtol=1e-6, atol=0)
    reference = FAMILIES[name].model.from_pretrained(plain, dtype=torch.float32).eval()
    ids = tokens(1)
    assert error(loaded(tmp_path).step([("a", ids)])[0], expected(reference, ids)) < 1e-4


def test_fp8_means_what_transformers_takes_it_for(tmp_path: Path) -> None:
    quantised(tmp_path, "deepseek-v3", FP8 | {"weight_block_size": [32, 32]}, fp8(32, 32), "experts")
    dequantise = Fp8Dequantize(None)._dequantize_one
    stored, ours = load_file(tmp_path / FILE), dict(iterate_weights(resolve(str(tmp_path))))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    theirs = dequantise(stored[name], stored[f"{name}_scale_inv"], torch.float32)
    torch.testing.assert_close(ours[name], theirs, rtol=1e-6, atol=0)


def changed(folder: Path, change: Callable[[Tensors], None]) -> str:
    """The refusal of the checkpoint after a change to its file."""
    stored = load_file(folder / FILE)
    change(stored)
    save_file(stored, folder / FILE)
    with pytest.raises(CheckpointError) as failure:
        loaded(folder)
    assert "\n" not in str(failure.value) and str(folder) in str(failure.value)
    return str(failure.value)


EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"


def put(part: str, tensor: torch.Tensor | None) -> Callable[[Tensors], None]:
    """Replace one stored part of an expert's weight, or drop it."""

    def change(stored: Tensors) -> None:
        del stored[f"{EXPERT}_{part}"]
        if tensor is not None:
            stored[f"{EXPERT}_{part}"] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put("scale", None), f"{EXPERT}_scale is missing"),
        (put("scale", torch.ones(64, 2)), r"_scale is \[64, 2\], must be \[64, 3\]"),
        (put("shape", torch.tensor([64, 95])), r"says \[64, 95\], but .* holds \[64, 96\]"),
        (put("packed", torch.zeros(64, 12)), r"_packed is F32 .*must be I32"),
        (put("packed", None), rf"1 missing \({EXPERT}\).*2 extra \({EXPERT}_"),
        (put("packed", torch.zeros(64, 11, dtype=torch.int32)), "rows of 88 are no whole groups of 32"),
    ],
)
def test_broken_int4_is_one_line_that_names_the_tensor(
    tmp_path: Path, change: Callable[[Tensors], None], named: str
) -> None:
    quantised(tmp_path, "kimi-k2", INT4, int4, ".experts.")
    message = changed(tmp_path, change)
    assert re.search(named, message), message


def test_broken_fp8_is_one_line_that_names_the_tensor(tmp_path: Path) -> None:
    quantised(tmp_path, "deepseek-v3", FP8, fp8(128, 128), "proj")
    name = "model.layers.0.mlp.down_proj.weight"
    message = changed(tmp_path, lambda stored: stored.update({f"{name}_scale_inv": torch.ones(2, 1)}))
    assert f"{name}_scale_inv is [2, 1], must be [1, 1] to scale {name}" in message
    message = changed(tmp_path, lambda stored: stored.pop(f"{name}_scale_inv"))
    assert f"tensor {name}: dtype F8_E4M3 is no float" in message


@pytest.mark.parametrize("inside", [True, False])
def test_a_wrapped_text_model_is_quantised_as_either_description_says(tmp_path: Path, inside: bool) -> None:
    write(tmp_path, "kimi-k2.5")
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    (fields["text_config"] if inside else fields)["quantization_config"] = INT4
    path.write_text(json.dumps(fields))
    assert read_folder_quantisation(tmp_path) == PackedInt4(32)
    assert read_model_config(resolve(str(tmp_path))).dtype == "quantised"


WEIGHTS = INT4["config_groups"]["group_0"]["weights"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("int8", "'int8' is not supported"),
        ({"quant_method": "awq"}, "'awq' is not supported (fp8 in blocks, compressed-tensors pack-quantized int4)"),
        ({"quant_method": "fp8"}, "weight_block_size must be two sizes, got None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size"),
        (FP8 | {"fmt": "e5m2"}, "fmt 'e5m2'"),
        (INT4 | {"format": "float-quantized"}, "format 'float-quantized' is not supported"),
        (INT4 | {"config_groups": {}}, "config_groups must be one group"),
        (INT4 | {"config_groups": {"g": {"weights": None}}}, "config_groups.g.weights is missing"),
        (INT4 | {"config_groups": {"g": {"weights": WEIGHTS | {"num_bits": 8}}}}, "g.weights.num_bits 8"),
        (INT4 | {"config_groups": {"g": {"weights": WEIGHTS | {"symmetric": False}}}}, "g.weights.symmetric False"),
        (INT4 | {"config_groups": {"g": {"weights": WEIGHTS | {"actorder": "group"}}}}, "g.weights.actorder"),
        (INT4 | {"config_groups": {"g": {"weights": WEIGHTS | {"group_size": 12}}}}, "group_size 12"),
    ],
)
def test_a_quantisation_that_is_not_supported_is_named(tmp_path: Path, config: object, named: str) -> None:
    write(tmp_path, "qwen3")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(CheckpointError) as failure:
        read_model_config(resolve(str(tmp_path)))
    assert named in str(failure.value) and "\n" not in str(failure.value) and "config.json" in str(failure.value)
