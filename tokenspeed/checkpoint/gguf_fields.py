"""What llama.cpp's metadata says about a model, put into config.json's words. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as _short
from typing import Any

from gguf.constants import GGMLQuantizationType

from tokenspeed.checkpoint.gguf_file import GGUFFile
from tokenspeed.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Family:
    """A family of files. `interleaved`: the rows of q and k alternate between the two halves of each rotated head,
    because llama.cpp rotates neighbours there. `experts`: a mixture, the experts of a layer in one tensor."""

    architecture: str
    interleaved: bool = False
    experts: bool = False


FAMILIES = {
    "llama": Family("LlamaForCausalLM", interleaved=True),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3moe": Family("Qwen3MoeForCausalLM", experts=True),
}
"""By `general.architecture`."""

# Metadata key after the family's name → config.json's word.
FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
EXPERT_FIELDS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
PLAIN = {
    GGMLQuantizationType.F64: "float32",
    GGMLQuantizationType.F32: "float32",
    GGMLQuantizationType.F16: "float16",
    GGMLQuantizationType.BF16: "bfloat16",
}
"""Types of plain numbers, and what they are called."""


@dataclass(frozen=True, slots=True)
class Described:
    """A file's model: `hf` as config.json would have it, `generation` as generation_config.json, `dtype` what the
    matrices are stored in, or quantised."""

    architecture: str
    hf: dict[str, Any]
    generation: dict[str, Any]
    dtype: str


def describe(path: Path) -> Described:
    """Read the header of `path`. Raises `CheckpointError` naming the field that is wrong or not supported."""
    file = str(path)
    with GGUFFile(path) as gguf:
        metadata = gguf.metadata
        name = metadata.get("general.architecture")
        if not isinstance(name, str) or name not in FAMILIES:
            raise CheckpointError(
                f"{file}: general.architecture {_short(name)} is not supported ({', '.join(FAMILIES)})"
            )
        family = FAMILIES[name]
        if metadata.get("split.count", 1) not in (0, 1):
            raise CheckpointError(f"{file}: split.count: a GGUF split over several files is not supported")
        if metadata.get(f"{name}.expert_count", 0) != 0 and not family.experts:
            raise CheckpointError(f"{file}: {name}.expert_count: experts are not supported in {name}")
        hf = _fields(gguf, name, file)
        if family.experts:
            hf |= _expert_fields(metadata, name, file)
        dtype = _dtype(gguf)
    end = [metadata[f"tokenizer.ggml.{key}"] for key in END_TOKENS if f"tokenizer.ggml.{key}" in metadata]
    generation = {word: metadata[key] for key, word in SAMPLING.items() if key in metadata}
    generation |= {"eos_token_id": end, "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id")}
    return Described(family.architecture, hf, generation, dtype)


def _dtype(gguf: GGUFFile) -> str:
    """What all matrices are stored in; of several types of plain numbers the first, for llama.cpp keeps the router of
    a mixture in float32."""
    types = [tensor.type for tensor in gguf.tensors.values() if len(tensor.shape) > 1]
    plain = [PLAIN[each] for each in types if each in PLAIN]
    return plain[0] if plain and len(plain) == len(types) else "quantised"


def _expert_fields(metadata: dict[str, Any], name: str, file: str) -> dict[str, Any]:
    scale = metadata.get(f"{name}.expert_weights_scale", 0)
    if scale not in (0, 1):
        raise CheckpointError(f"{file}: {name}.expert_weights_scale {_short(scale)} is not supported (1)")
    hf = {word: metadata[f"{name}.{key}"] for key, word in EXPERT_FIELDS.items() if f"{name}.{key}" in metadata}
    return {**hf, "norm_topk_prob": True}


def _fields(gguf: GGUFFile, name: str, file: str) -> dict[str, Any]:
    metadata = gguf.metadata
    hf: dict[str, Any] = {"architectures": [FAMILIES[name].architecture], "model_type": name}
    for key, word in FIELDS.items():
        if (value := metadata.get(f"{name}.{key}")) is not None:
            hf[word] = value
    tokens = metadata.get("tokenizer.ggml.tokens")
    hf["vocab_size"] = metadata.get(f"{name}.vocab_size", len(tokens) if isinstance(tokens, list) else None)
    hf["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    hf["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    hf["mlp_bias"] = "blk.0.ffn_gate.bias" in gguf.tensors
    if window := metadata.get(f"{name}.attention.sliding_window"):
        hf["sliding_window"] = window
    heads, hidden = hf.get("num_attention_heads"), hf.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        rotated = metadata.get(f"{name}.rope.dimension_count", hf.get("head_dim", hidden // heads))
        if rotated != hf.get("head_dim", hidden // heads):
            raise CheckpointError(f"{file}: {name}.rope.dimension_count: rotating part of a head is not supported")
    value_length = metadata.get(f"{name}.attention.value_length", hf.get("head_dim"))
    if value_length != hf.get("head_dim"):
        raise CheckpointError(f"{file}: {name}.attention.value_length: differs from key_length")
    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise CheckpointError(f"{file}: {name}.rope.scaling.type {_short(scaling)} is not supported (none, linear)")
    if scaling == "linear":
        hf["rope_scaling"] = {"rope_type": "linear", "factor": metadata.get(f"{name}.rope.scaling.factor")}
    if "rope_freqs.weight" in gguf.tensors:
        hf["rope_scaling"] = {"rope_type": "divisors", "divisors": gguf.dequantised("rope_freqs.weight").tolist()}
    return hf
