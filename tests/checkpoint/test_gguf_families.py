"""llama.cpp's families of files besides llama give the logits of `transformers`; others are refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from safetensors.torch import load_file

from tests.checkpoint.test_gguf_blocks import build, logits
from tests.checkpoint.toy_gguf import GGUFType, write_gguf
from tests.models.families import write
from tests.models.reference import error, expected, tokens
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.gguf_blocks import FORMS
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.checkpoint.weights import stored_forms
from tokenspeed.errors import CheckpointError

FAMILIES = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3-moe"}
"""llama.cpp's name → that of the models' tests."""

TypeOf = Callable[[str], gguf.GGMLQuantizationType]


def written(folder: Path, family: str, type_of: TypeOf = lambda _: GGUFType.F32, **changes: object) -> Source:
    """A small random model as a folder and beside it as a GGUF file, its matrices already of the numbers of their
    types."""
    dense = {"mlp_only_layers": []} if family == "qwen3moe" else {}
    model = write(folder, FAMILIES[family], **dense, **changes)
    tensors = load_file(folder / "model.safetensors")
    write_gguf(folder / "toy.gguf", family, model.config, tensors, type_of)
    return resolve(str(folder / "toy.gguf"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path: Path, family: str, tied: bool) -> None:
    dense = {"mlp_only_layers": []} if family == "qwen3moe" else {}
    model = write(tmp_path, FAMILIES[family], tie_word_embeddings=tied, **dense)
    tensors = load_file(tmp_path / "model.safetensors")
    write_gguf(tmp_path / "toy.gguf", family, model.config, tensors, lambda _: GGUFType.F32)
    source, ids = resolve(str(tmp_path / "toy.gguf")), tokens(1)
    assert read_model_config(source).architecture == read_model_config(Source("hf", tmp_path, "toy")).architecture
    assert error(logits(build(source, stored_forms(source)), ids), expected(model, ids)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_matrices_and_experts_are_the_numbers_of_their_blocks(tmp_path: Path, family: str) -> None:
    source = written(tmp_path, family, lambda name: GGUFType.F32 if name.endswith("mlp.gate.weight") else GGUFType.Q8_0,
                     moe_intermediate_size=64)  # fmt: skip
    forms, ids = stored_forms(source), tokens(1)
    assert set(forms.values()) == {FORMS[GGUFType.Q8_0][0]}
    assert error(logits(build(source, forms), ids), logits(build(source, {}), ids)) < 1e-4
    assert read_model_config(source).dtype == "quantised"


def test_another_family_is_refused_in_one_line(tmp_path: Path) -> None:
    written(tmp_path, "qwen3")
    path = tmp_path / "toy.gguf"
    path.write_bytes(path.read_bytes().replace(b"qwen3", b"gemma"))
    with pytest.raises(CheckpointError) as failure:
        read_model_config(resolve(str(path)))
    message = str(failure.value)
    assert "'gemma' is not supported (llama, qwen2, qwen3, qwen3moe)" in message and "\n" not in message


def test_a_window_that_is_in_use_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path, "qwen2")
    tensors = load_file(tmp_path / "model.safetensors")
    window = {"qwen2.attention.sliding_window": 64}
    write_gguf(tmp_path / "toy.gguf", "qwen2", model.config, tensors, lambda _: GGUFType.F32, metadata=window)
    with pytest.raises(CheckpointError, match="sliding_window 64 is not supported"):
        build(resolve(str(tmp_path / "toy.gguf")), {})


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_experts_of_a_family_that_has_none_are_refused(tmp_path: Path, family: str) -> None:
    model = write(tmp_path, "qwen3")
    tensors = load_file(tmp_path / "model.safetensors")
    experts = {f"{family}.expert_count": 4}
    write_gguf(tmp_path / "toy.gguf", family, model.config, tensors, lambda _: GGUFType.F32, metadata=experts)
    with pytest.raises(CheckpointError, match=f"{family}.expert_count: experts are not supported"):
        read_model_config(resolve(str(tmp_path / "toy.gguf")))
