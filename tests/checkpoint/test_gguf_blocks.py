"""GGUF's blocks become packed weights of the same numbers, and models built of them give the same logits."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.checkpoint.toy_gguf import GGUFType, write_gguf, write_llama
from tests.models.paged import PagedModel
from tests.models.reference import checkpoint, error, expected, tokens
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.gguf_blocks import FORMS, taken_apart
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.checkpoint.weights import load_weights, stored_forms
from tokenspeed.kernels.forms import pack_quantised, unpack
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import build_model

BLOCK = 16


TWO = (GGUFType.Q4_1, GGUFType.Q5_1, GGUFType.Q4_K, GGUFType.Q5_K)
HALVES = {GGUFType.Q6_K: (208,), **dict.fromkeys(TWO, (0, 2))}
"""Where a block has its scales in half precision; others have one in front."""


def blocks(kind: gguf.GGMLQuantizationType, rows: int, in_a_row: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bits, whose scales are numbers."""
    _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (rows * in_a_row, num_bytes), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        raw[:, at : at + 2] = random.normal(size=(rows * in_a_row, 1)).astype("<f2").view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", FORMS, ids=lambda kind: kind.name)
def test_every_bit_of_a_block_counts(kind: gguf.GGMLQuantizationType) -> None:
    raw = blocks(kind, 19, 3)
    rows = taken_apart(kind, torch.from_numpy(raw))
    wanted = torch.from_numpy(gguf.quants.dequantize(raw, kind))
    assert torch.equal(unpack(pack_quantised(rows), torch.float32), wanted)
    if kind is not GGUFType.Q8_0:  # rounded once: what the product computes
        assert torch.equal(unpack(pack_quantised(rows.as_mixed()), torch.float64).float(), wanted)


def build(source: Source, forms: dict[str, str]) -> CausalLM:
    ctx = BuildContext.of(
        device=torch.device("cpu"), dtype=torch.float32, max_positions=256, block_size=BLOCK, forms=forms
    )
    model = build_model(read_model_config(source), ctx)
    load_weights(model, source)
    return model


def logits(model: CausalLM, ids: list[int]) -> torch.Tensor:
    return PagedModel(model, block_size=BLOCK, dtype=torch.float32).step([("a", ids)])[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "kind", [GGUFType.Q4_0, GGUFType.Q4_1, GGUFType.Q5_0, GGUFType.Q5_1, GGUFType.Q8_0], ids=lambda kind: kind.name
)
def test_a_model_of_stored_weights_gives_the_logits_of_the_model_it_was_made_from(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, tied: bool
) -> None:
    reference = checkpoint(tmp_path, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    for parameter in reference.parameters():
        if parameter.dim() == 2:
            values = gguf.quants.quantize(parameter.detach().numpy(), kind)
            parameter.data.copy_(torch.from_numpy(gguf.quants.dequantize(values, kind)))
    write_llama(tmp_path / "toy.gguf", reference, kind)
    source, ids = resolve(str(tmp_path / "toy.gguf")), tokens(1)
    forms = stored_forms(source)
    assert set(forms.values()) == {FORMS[kind][0]}
    model = build(source, forms)
    assert error(logits(model, ids), expected(reference, ids)) < 1e-4
    size = sum(weight.parameter.nbytes for weight in model.weights())
    assert size < sum(weight.parameter.nbytes for weight in build(source, {}).weights()) / 2


def kinds_of_q4_k_m(name: str) -> gguf.GGMLQuantizationType:
    """As llama.cpp deals them in the layers that it takes for important."""
    finer = name.endswith(("v_proj.weight", "down_proj.weight", "lm_head.weight"))
    return GGUFType.Q6_K if finer else GGUFType.Q4_K


def test_a_file_of_two_types_is_computed_as_it_is_stored(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, hidden_size=256, intermediate_size=256, num_attention_heads=16)
    tensors = dict(reference.state_dict())
    for name, parameter in reference.named_parameters():
        if parameter.dim() == 2:
            kind = kinds_of_q4_k_m(name)
            raw = blocks(kind, parameter.shape[0], 1, seed=len(name) + parameter.shape[0])
            for at in HALVES[kind]:
                halves = raw[:, at : at + 2].copy().view("<f2")
                raw[:, at : at + 2] = (halves / 2048).view(np.uint8)
            tensors[name] = torch.from_numpy(raw)
            parameter.data.copy_(torch.from_numpy(gguf.quants.dequantize(raw, kind)))
    write_gguf(tmp_path / "toy.gguf", "llama", reference.config, tensors, kinds_of_q4_k_m)
    source, ids = resolve(str(tmp_path / "toy.gguf")), tokens(1)
    model = build(source, stored_forms(source))
    assert {weight.form for weight in model.weights() if len(weight.shape) == 2} == {"q4_k", "q6_k", "mixed"}
    assert error(logits(model, ids), expected(reference, ids)) < 1e-4


def test_a_matrix_of_stored_and_plain_tensors_is_loaded_as_rows(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path)
    write_llama(tmp_path / "toy.gguf", reference, GGUFType.Q4_1)
    source, ids = resolve(str(tmp_path / "toy.gguf")), tokens(1)
    mixed = {name: form for name, form in stored_forms(source).items() if not name.endswith("v_proj.weight")}
    assert error(logits(build(source, mixed), ids), logits(build(source, {}), ids)) < 1e-5


def test_a_folder_stores_nothing_packed(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    assert stored_forms(resolve(str(tmp_path))) == {}
