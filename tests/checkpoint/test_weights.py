"""Weights reach the parameters they belong to, from folders and from GGUF files, or one line says what is wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.checkpoint.toy_gguf import GGUFType, write_llama
from tests.models.paged import PagedModel
from tests.models.reference import checkpoint, error, expected, tokens
from tokenspeed.checkpoint.config import ModelConfig, read_model_config
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.checkpoint.weights import default_dtype, iterate_weights, load_weights
from tokenspeed.errors import CheckpointError
from tokenspeed.kernels.platform import Platform
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import build_model

BLOCK = 16
FILE = "model.safetensors"


def build(source: Source) -> CausalLM:
    ctx = BuildContext.of(device=torch.device("cpu"), dtype=torch.float32, max_positions=256, block_size=BLOCK)
    return build_model(read_model_config(source), ctx)


def logits(source: Source, ids: list[int]) -> torch.Tensor:
    model = build(source)
    load_weights(model, source)
    return PagedModel(model, block_size=BLOCK, dtype=torch.float32).step([("a", ids)])[0]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [GGUFType.F32, GGUFType.Q8_0, GGUFType.Q4_1, GGUFType.F16], ids=lambda kind: kind.name)
def test_a_gguf_gives_the_logits_of_the_model_it_was_made_from(
    tmp_path: Path, kind: gguf.GGMLQuantizationType, tied: bool
) -> None:
    reference = checkpoint(tmp_path, tie_word_embeddings=tied, attention_bias=True, mlp_bias=True)
    for parameter in reference.parameters():
        if parameter.dim() == 2:
            values = gguf.quants.quantize(parameter.detach().numpy(), kind)
            parameter.data.copy_(torch.from_numpy(gguf.quants.dequantize(values, kind)))
    write_llama(tmp_path / "toy.gguf", reference, kind)
    ids = tokens(1)
    assert error(logits(resolve(str(tmp_path / "toy.gguf")), ids), expected(reference, ids)) < 1e-4


def test_a_gguf_brings_its_rotary_scaling_as_divisors(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path)
    divisors = [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0]
    write_llama(tmp_path / "toy.gguf", reference, divisors=divisors)
    ids = tokens(1)
    got = logits(resolve(str(tmp_path / "toy.gguf")), ids)
    assert error(got, expected(reference, ids)) > 0.01, "unscaled rotation must not pass"
    reference.model.rotary_emb.inv_freq.div_(torch.tensor(divisors))
    assert error(got, expected(reference, ids)) < 1e-4


def test_names_and_values_are_those_of_the_folder(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path)
    write_llama(tmp_path / "toy.gguf", reference)
    for source in (Source("hf", tmp_path, "toy"), Source("gguf", tmp_path / "toy.gguf", "toy")):
        ours = dict(iterate_weights(source))
        assert ours.keys() == reference.state_dict().keys()
        for name, tensor in reference.state_dict().items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, max_shard_size="60KB")
    calls: list[tuple[int, int]] = []
    source = resolve(str(tmp_path))
    load_weights(build(source), source, lambda done, total: calls.append((done, total)))
    num_bytes = sum(4 * tensor.numel() for tensor in reference.state_dict().values())
    assert calls[-1] == (num_bytes, num_bytes) and len(calls) == len(reference.state_dict())
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def refused(source: Source) -> str:
    with pytest.raises(CheckpointError) as failure:
        load_weights(build(source), source)
    message = str(failure.value)
    assert "\n" not in message and str(source.path) in message
    return message


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    tensors = load_file(tmp_path / FILE)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(127, 96)
    save_file(tensors, tmp_path / FILE)
    message = refused(resolve(str(tmp_path)))
    assert "1 missing (model.layers.1.self_attn.k_proj.weight)" in message
    assert "1 extra (model.layers.9.mlp.up_proj.weight)" in message
    assert "1 misshapen (model.layers.0.mlp.gate_proj.weight is [127, 96], must be [128, 96])" in message


def test_a_configuration_of_more_layers_than_the_file_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 9}))
    message = refused(resolve(str(tmp_path)))
    assert "54 missing (" in message and len(message) < 600


def test_an_integer_tensor_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    tensors = load_file(tmp_path / FILE)
    tensors["model.norm.weight"] = torch.ones(96, dtype=torch.int8)
    save_file(tensors, tmp_path / FILE)
    assert "tensor model.norm.weight: dtype I8" in refused(resolve(str(tmp_path)))


def test_what_old_exports_carry_along_is_ignored(tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / FILE)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors["lm_head.weight"] = reference.get_input_embeddings().weight.detach().clone()
    save_file(tensors, tmp_path / FILE)
    ids = tokens(2)
    assert error(logits(resolve(str(tmp_path)), ids), expected(reference, ids)) < 1e-4


@pytest.mark.parametrize(
    ("name", "renamed"),
    [
        ("blk.0.attn_q.weight", "blk.0.attn_x.weight"),
        ("blk.0.attn_q.weight", "blk.7.attn_q.weight"),
        ("token_embd.weight", "taken_embd.weight"),
    ],
)
def test_an_unknown_gguf_tensor_is_named(tmp_path: Path, name: str, renamed: str) -> None:
    write_llama(tmp_path / "toy.gguf", checkpoint(tmp_path))
    content = (tmp_path / "toy.gguf").read_bytes()
    (tmp_path / "toy.gguf").write_bytes(content.replace(name.encode(), renamed.encode(), 1))
    message = refused(resolve(str(tmp_path / "toy.gguf")))
    assert "1 missing (model." in message and "1 extra (" in message
    assert renamed in message or "model.layers.7.self_attn.q_proj.weight" in message


@pytest.mark.parametrize(
    ("stored", "vendor", "isa", "computed"),
    [
        ("float32", "cpu", {"avx512_bf16"}, torch.float32),
        ("bfloat16", "cpu", {"avx2", "fma"}, torch.float32),
        ("bfloat16", "cpu", {"avx2", "avx512_bf16"}, torch.bfloat16),
        ("bfloat16", "cpu", {"amx_bf16"}, torch.bfloat16),
        ("quantised", "cpu", {"avx2"}, torch.float32),
        ("float16", "nvidia", {"sm80", "sm90"}, torch.bfloat16),
        ("quantised", "nvidia", {"sm80"}, torch.bfloat16),
        ("float32", "nvidia", {"sm80"}, torch.float32),
    ],
)
def test_the_default_dtype_is_what_the_machine_computes_fast(
    stored: str, vendor: str, isa: set[str], computed: torch.dtype
) -> None:
    config = ModelConfig(
        file="config.json",
        architecture="LlamaForCausalLM",
        hf={},
        vocab_size=8,
        max_position_embeddings=8,
        dtype=stored,
        eos_token_ids=(),
        bos_token_id=None,
        generation_defaults={},
    )
    assert default_dtype(config, Platform(vendor, "", frozenset(isa))) is computed


DEMO_DIGEST = "849ea5f33c8dcd4c792bcb8609ea8236cee2394b9438e06a6d4698563ea52262"
"""Of the embedded model's tensors as `transformers` loads them; `python -m tests.checkpoint.test_weights` prints it."""


def digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A hash of names, shapes and float32 values, in the order of the names."""
    total = hashlib.sha256()
    parts = {name: hashlib.sha256(tensor.float().numpy().data) for name, tensor in tensors}
    for name in sorted(parts):
        total.update(name.encode() + parts[name].digest())
    return total.hexdigest()


def demo_reference() -> transformers.LlamaForCausalLM:
    """The embedded model's architecture in `transformers`, without memory for its weights."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=9.999999747378752e-06,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        reference = transformers.LlamaForCausalLM(config)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)
    return reference.eval()


def test_the_embedded_model_gives_the_logits_and_tokens_of_transformers() -> None:
    source = resolve(None)
    weights = dict(iterate_weights(source))
    assert digest(weights.items()) == DEMO_DIGEST
    reference = demo_reference()
    reference.load_state_dict(weights, strict=False, assign=True)
    reference.tie_weights()

    model = build(source)
    load_weights(model, source)
    paged = PagedModel(model, block_size=BLOCK, dtype=torch.float32)
    # "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n", then scattered ids.
    question = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
    for name, prompt in (("question", question), ("scattered", [t % 49152 for t in range(17, 9_000_000, 150_001)])):
        got = paged.step([(name, prompt)])[0]
        assert error(got, expected(reference, prompt)) < 1e-4
        ids = list(prompt)
        for _ in range(12):
            ids.append(int(got[-1].argmax()))
            got = paged.step([(name, ids[-1:])])[0]
        want = expected(reference, ids)
        assert ids[len(prompt) :] == want[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert error(got, want[-1:]) < 1e-4


if __name__ == "__main__":
    loaded = load_gguf_checkpoint(str(resolve(None).path), return_tensors=True, model_to_load=demo_reference())
    print(digest(loaded["tensors"].items()))
