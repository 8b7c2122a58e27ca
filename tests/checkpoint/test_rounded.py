"""Matrices of plain numbers are rounded to 8 bits while they are loaded, wherever they come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoint.toy_gguf import GGUFType, write_gguf, write_llama
from tests.layers.over_ranks import models_of
from tests.models.families import write
from tests.models.paged import PagedModel
from tests.models.reference import checkpoint, error, expected, tokens
from tokenspeed.checkpoint import folder_weights, gguf_file
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.random_weights import STD
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.checkpoint.weights import load_weights, stored_forms
from tokenspeed.errors import CheckpointError, ConfigError
from tokenspeed.executor.load import form_of_plain
from tokenspeed.kernels.forms import ROWS, Packed, pack_quantised, rounded, unpack
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Target
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import build_model, make_model
from tokenspeed.parallel.mesh import Mesh

FILE = "model.safetensors"
BLOCK = 16
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_weights, "PART_ELEMENTS", 1000)
    monkeypatch.setattr(gguf_file, "PART_ELEMENTS", 1000)


def build(source: Source, form: str) -> CausalLM:
    ctx = BuildContext.of(device=CPU, dtype=torch.float32, max_positions=256, block_size=BLOCK, plain_form=form)
    model = build_model(read_model_config(source), ctx)
    load_weights(model, source)
    return model


def logits(model: CausalLM, ids: list[int]) -> torch.Tensor:
    return PagedModel(model, block_size=BLOCK, dtype=torch.float32).step([("a", ids)])[0]


def nearest(matrix: torch.Tensor) -> torch.Tensor:
    return unpack(pack_quantised(rounded(matrix)), torch.float32)[:, : matrix.shape[1]]


def packed_names(model: CausalLM, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """The tensors that packed weights are filled with, each piece compared with what rounding its tensor gives."""
    found = set()
    for weight in model.weights():
        if weight.form != ROWS:
            whole = unpack(Packed(weight.parameter.data, weight.form, *weight.shape), torch.float32)
            for piece in weight.pieces:
                wanted = nearest(tensors[piece.source].float())[piece.part or ...]
                assert torch.equal(whole[piece.at], wanted), piece
                found.add(piece.source)
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_every_matrix_of_a_folder_is_rounded_once(tmp_path: Path, tied: bool) -> None:
    # 120: no whole groups, no whole panels
    reference = checkpoint(tmp_path, tie_word_embeddings=tied, intermediate_size=120)
    source, ids = resolve(str(tmp_path)), tokens(1)
    model, plain = build(source, "q8_0"), build(source, ROWS)
    matrices = {name for name, tensor in reference.state_dict().items() if tensor.dim() == 2}
    assert packed_names(model, reference.state_dict()) == matrices - ({"lm_head.weight"} if tied else set())
    sizes = [sum(weight.parameter.nbytes for weight in each.weights()) for each in (model, plain)]
    assert sizes[0] < 0.3 * sizes[1]
    assert error(logits(model, ids), expected(reference, ids)) > 1e-3, "nothing is rounded"
    for parameter in reference.parameters():
        if parameter.dim() == 2:
            parameter.data.copy_(nearest(parameter.data))
    assert error(logits(model, ids), expected(reference, ids)) < 1e-4


@pytest.mark.parametrize("kind", [GGUFType.F32, GGUFType.F16, GGUFType.BF16], ids=lambda kind: kind.name)
def test_every_matrix_of_a_file_of_plain_numbers_is_rounded_once(tmp_path: Path, kind: GGUFType) -> None:
    reference = checkpoint(tmp_path)
    stored = {GGUFType.F16: torch.float16, GGUFType.BF16: torch.bfloat16}.get(kind, torch.float32)
    tensors = {name: tensor.to(stored).float() for name, tensor in reference.state_dict().items()}
    write_llama(tmp_path / "toy.gguf", reference, kind)
    source = resolve(str(tmp_path / "toy.gguf"))
    assert read_model_config(source).dtype == str(stored).removeprefix("torch.")
    assert packed_names(build(source, "q8_0"), tensors) == {name for name in tensors if tensors[name].dim() == 2}


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_rank_has_its_share_of_the_same_numbers(tmp_path: Path, ranks: int) -> None:
    write(tmp_path, "qwen2", num_key_value_heads=2, hidden_size=128, intermediate_size=192)
    tensors = load_file(tmp_path / FILE)
    for model in models_of(tmp_path, Mesh.of(ranks), "cpu", "q8_0"):
        load_weights(model, resolve(str(tmp_path)))
        found = {name.split(".")[-2] for name in packed_names(model, tensors)}
        # Columns that are cut within a group stay as they are: a rank of four has 48 of down_proj's.
        assert found >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head"}
        assert ("down_proj" in found) == (ranks == 2)


def test_each_rank_has_its_share_of_a_stored_matrix(tmp_path: Path) -> None:
    """Rows and columns of blocks, cut at whole groups."""
    model = write(tmp_path, "qwen2", hidden_size=128, intermediate_size=192)
    tensors = load_file(tmp_path / FILE)
    write_gguf(tmp_path / "toy.gguf", "qwen2", model.config, tensors, lambda _: GGUFType.Q8_0)
    source = resolve(str(tmp_path / "toy.gguf"))
    whole = stored_matrices(source, Mesh.single(), 0)
    for rank in range(2):
        share = stored_matrices(source, Mesh.of(2), rank)
        down = whole["model.layers.0.mlp.down_proj.weight"]
        assert torch.equal(share["model.layers.0.mlp.down_proj.weight"], down[:, 96 * rank : 96 * (rank + 1)])
        up = whole["model.layers.0.mlp.gate_proj.weight"].view(2, 2, 96, 128)
        assert torch.equal(share["model.layers.0.mlp.gate_proj.weight"], up[:, rank].reshape(192, 128))


def stored_matrices(source: Source, mesh: Mesh, rank: int) -> dict[str, torch.Tensor]:
    """The packed weights of a rank, by the name of their first tensor."""
    ctx = BuildContext.of(
        device=CPU, dtype=torch.float32, max_positions=64, block_size=BLOCK, mesh=mesh, rank=rank,
        forms=stored_forms(source),
    )  # fmt: skip
    model = make_model(read_model_config(source), ctx)
    load_weights(model, source)
    return {
        weight.pieces[0].source: unpack(Packed(weight.parameter.data, weight.form, *weight.shape), torch.float32)
        for weight in model.weights() if weight.form != ROWS
    }  # fmt: skip


def test_a_dummy_is_random_and_rounded(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    model = build(resolve(str(tmp_path), "dummy"), "q8_0")
    for weight in model.weights():
        if weight.form == ROWS:
            assert weight.parameter.dim() == 1
        else:
            numbers = unpack(Packed(weight.parameter.data, weight.form, *weight.shape), torch.float32)
            embedding = weight.pieces[0].source.endswith("embed_tokens.weight")
            assert numbers.std() == pytest.approx(STD * (25 if embedding else 1), rel=0.1)


def test_latent_attention_and_experts_stay_plain(tmp_path: Path) -> None:
    reference = write(tmp_path, "deepseek-v3")
    source, ids = resolve(str(tmp_path)), tokens(1)
    model = build(source, "q8_0")
    found = packed_names(model, load_file(tmp_path / FILE))
    assert "model.layers.0.mlp.down_proj.weight" in found and "lm_head.weight" in found
    assert not any("self_attn" in name or ".experts." in name for name in found)
    for name, parameter in reference.named_parameters():
        if name in found:
            parameter.data.copy_(nearest(parameter.data))
    assert error(logits(model, ids), expected(reference, ids)) < 1e-4


def test_a_number_that_eight_bits_cannot_hold_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    stored = load_file(tmp_path / FILE)
    stored["model.layers.1.mlp.up_proj.weight"][100, 3] = torch.inf
    save_file(stored, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"^tensor model\.layers\.1\.mlp\.up_proj\.weight: 8 bits") as failure:
        build(resolve(str(tmp_path)), "q8_0")
    assert "\n" not in str(failure.value)


def test_what_cannot_be_rounded_is_refused_with_the_flag(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path)
    write_llama(tmp_path / "toy.gguf", reference, GGUFType.Q4_1)
    plain, quantised = (read_model_config(resolve(str(path))) for path in (tmp_path, tmp_path / "toy.gguf"))
    here, gpu = Target(Platform.of(CPU), torch.float32), Target(Platform("nvidia", "sm90"), torch.float32)
    assert form_of_plain("none", here, quantised) == ROWS and form_of_plain("int8", here, plain) == "q8_0"
    with pytest.raises(ConfigError, match=r"^--quantization int8 needs a CPU, this engine runs on nvidia$"):
        form_of_plain("int8", gpu, plain)
    with pytest.raises(ConfigError, match=r"^--quantization int8: the weights of .*toy.gguf are quantised already$"):
        form_of_plain("int8", here, quantised)
