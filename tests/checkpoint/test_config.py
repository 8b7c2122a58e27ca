"""What a checkpoint says about its model is read without torch, and checked field by field."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.checkpoint.toy_gguf import write_llama
from tests.toy import toy_llama
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.errors import CheckpointError

FIELDS: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def folder(path: Path, fields: object, generation: object = None) -> Source:
    (path / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    return Source("hf", path, "toy")


def refused(source: Source) -> str:
    with pytest.raises(CheckpointError) as failure:
        read_model_config(source)
    message = str(failure.value)
    assert "\n" not in message
    return message


def test_a_folder_is_read(tmp_path: Path) -> None:
    generation = {"eos_token_id": [7, 2], "temperature": 0.6, "top_p": 0.9, "top_k": 20, "do_sample": True}
    config = read_model_config(folder(tmp_path, FIELDS, generation))
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.max_position_embeddings, config.dtype) == (64, 128, "bfloat16")
    assert config.eos_token_ids == (7, 2) and config.bos_token_id == 1
    assert config.generation_defaults == {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    assert config.hf["hidden_size"] == 48


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 48.0}, "hidden_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"head_dim": -8}, "head_dim"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"architectures": []}, "architectures"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": [3]}, "architectures"),
        ({"eos_token_id": 64}, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": True}, "bos_token_id"),
        ({"torch_dtype": "int8"}, "dtype"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    ],
)
def test_a_field_out_of_range_is_named(tmp_path: Path, change: dict[str, object], named: str) -> None:
    message = refused(folder(tmp_path, FIELDS | change))
    assert named in message and "config.json" in message


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": 2.5},
        {"repetition_penalty": 0.0},
        {"min_p": True},
        {"eos_token_id": 99},
    ],
)
def test_a_generation_default_out_of_range_is_named(tmp_path: Path, change: dict[str, object]) -> None:
    message = refused(folder(tmp_path, FIELDS, change))
    assert next(iter(change)) in message and "generation_config.json" in message


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"a": NaN}', "\x00"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    assert "config.json" in refused(folder(tmp_path, text))


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    assert "config.json" in refused(Source("hf", tmp_path, "toy"))


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    fields = FIELDS | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}}
    assert read_model_config(folder(tmp_path, fields)).architecture == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> LlamaForCausalLM:
    return toy_llama(tmp_path_factory.mktemp("hf"), num_hidden_layers=1)


def test_a_gguf_says_the_same_as_the_folder_it_was_made_from(tmp_path: Path, reference: LlamaForCausalLM) -> None:
    reference.save_pretrained(tmp_path)
    write_llama(tmp_path / "toy.gguf", reference)
    ours = read_model_config(Source("gguf", tmp_path / "toy.gguf", "toy"))
    theirs = read_model_config(Source("hf", tmp_path, "toy"))
    for name in ("architecture", "vocab_size", "max_position_embeddings", "bos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        assert ours.hf[name] == theirs.hf[name]
    assert ours.eos_token_ids == (2, 1) and ours.dtype == "float32"
    assert ours.hf["rms_norm_eps"] == pytest.approx(theirs.hf["rms_norm_eps"])


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("llama.expert_count", 8, "expert_count"),
        ("split.count", 3, "split.count"),
        ("llama.rope.scaling.type", 7, "rope.scaling.type"),
    ],
)
def test_a_gguf_of_an_unsupported_kind_is_named(
    tmp_path: Path, reference: LlamaForCausalLM, key: str, value: int, named: str
) -> None:
    write_llama(tmp_path / "toy.gguf", reference, metadata={key: value})
    message = refused(resolve(str(tmp_path / "toy.gguf")))
    assert named in message and "toy.gguf" in message


def test_reading_a_configuration_loads_no_torch() -> None:
    code = "import sys, tokenspeed.checkpoint.config, tokenspeed.checkpoint.source; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
