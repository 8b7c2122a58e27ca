"""Plain matrices that are packed while they are loaded: the same numbers, of any file, on any rank, each once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.checkpoint.toy_gguf import GGUFType, write_llama
from tests.models.reference import checkpoint
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.checkpoint.weights import load_weights, stored_forms
from tokenspeed.kernels.forms import PANELS, ROWS, Packed, unpack
from tokenspeed.layers.module import BuildContext, Weight
from tokenspeed.models.registry import build_model
from tokenspeed.parallel.mesh import Mesh

ONE = Mesh.single()
TWO = Mesh.of(2, attn_tp=2)


def weights(source: Source, plain_form: str, mesh: Mesh, rank: int, forms: dict[str, str]) -> list[Weight]:
    ctx = BuildContext.of(
        device=torch.device("cpu"), dtype=torch.bfloat16, max_positions=256, block_size=16, mesh=mesh, rank=rank,
        plain_form=plain_form, forms=forms,
    )  # fmt: skip
    model = build_model(read_model_config(source), ctx)
    for weight in model.weights():
        if weight.pieces and weight.parameter.is_floating_point():
            weight.parameter.data.fill_(torch.nan)
    load_weights(model, source)
    return list(model.weights())


def same_numbers(source: Source, mesh: Mesh = ONE, rank: int = 0, forms: dict[str, str] | None = None) -> list[str]:
    """The forms of the weights, whose numbers are those of a model that is kept in rows."""
    packed, rows = (weights(source, form, mesh, rank, forms or {}) for form in (PANELS, ROWS))
    assert len(packed) == len(rows)
    for ours, theirs in zip(packed, rows, strict=True):
        data = ours.parameter.data
        if ours.form == PANELS:
            data = unpack(Packed(data, PANELS, *ours.shape), torch.bfloat16)
        assert torch.equal(data, theirs.parameter.data)
    return [weight.form for weight in packed]


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_folder(tmp_path: Path, tied: bool) -> None:
    checkpoint(tmp_path, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    forms = same_numbers(resolve(str(tmp_path)))
    # Four a layer of two, the embedding, and the head where it is not the same.
    layers = read_model_config(resolve(str(tmp_path))).hf["num_hidden_layers"]
    assert forms.count(PANELS) == 4 * layers + (1 if tied else 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_a_rank(tmp_path: Path, rank: int) -> None:
    checkpoint(tmp_path, tie_word_embeddings=False, attention_bias=True)
    assert PANELS in same_numbers(resolve(str(tmp_path)), TWO, rank)


def test_of_a_file_whose_other_matrices_stay_as_they_are_stored(tmp_path: Path) -> None:
    write_llama(tmp_path / "toy.gguf", checkpoint(tmp_path), GGUFType.Q4_1)
    source = resolve(str(tmp_path / "toy.gguf"))
    stored = stored_forms(source)
    mixed = {name: form for name, form in stored.items() if not name.endswith("v_proj.weight")}
    forms = same_numbers(source, forms=mixed)
    assert PANELS in forms and "q4_1" in forms
    assert PANELS not in same_numbers(source, forms=stored)


def test_of_no_file(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    dummy = dataclasses.replace(resolve(str(tmp_path)), dummy=True)
    assert PANELS in same_numbers(dummy)
