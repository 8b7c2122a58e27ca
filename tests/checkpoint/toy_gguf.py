"""GGUF files written by the `gguf` package, as llama.cpp's converter lays them out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from transformers import LlamaForCausalLM, PretrainedConfig

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.weight")
GGUFType = gguf.GGMLQuantizationType


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, index, rest = stem.split(".", 3)
        return f"blk.{index}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The two halves of each head's rows alternate in a GGUF, because llama.cpp rotates neighbours."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


def write_llama(
    path: Path,
    model: LlamaForCausalLM,
    matrix_type: gguf.GGMLQuantizationType = GGUFType.F32,
    *,
    divisors: list[float] | None = None,
    metadata: dict[str, int] | None = None,
) -> None:
    """Write `model` with its matrices in `matrix_type`; vectors stay float32."""
    write_gguf(
        path, "llama", model.config, model.state_dict(), lambda _: matrix_type, divisors=divisors, metadata=metadata
    )


def write_gguf(
    path: Path,
    family: str,
    config: PretrainedConfig,
    tensors: Mapping[str, torch.Tensor],
    type_of: Callable[[str], gguf.GGMLQuantizationType],
    *,
    divisors: list[float] | None = None,
    metadata: dict[str, int] | None = None,
) -> None:
    """Write a model of Hugging Face's tensors, its matrices in the type of their name; vectors stay float32. Bytes are
    rows of blocks of that type already."""
    writer = gguf.GGUFWriter(path, family)
    _describe(writer, family, config)
    for key, value in (metadata or {}).items():
        writer.add_uint32(key, value)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, dtype=np.float32))
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if family == "llama" else {}
    experts: dict[str, list[tuple[int, np.ndarray, gguf.GGMLQuantizationType]]] = {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = tensor.dtype is torch.uint8
        values = (tensor if stored else tensor.to(torch.float32)).numpy()
        projection = name.split(".")[-2]
        if projection in heads:
            values = interleaved(values, heads[projection])
        if (expert := EXPERT.fullmatch(name)) is not None:
            stacked = f"blk.{expert[1]}.{NAMES[f'mlp.{expert[3]}']}_exps.weight"
            experts.setdefault(stacked, []).append((int(expert[2]), quantize(values, type_of(name)), type_of(name)))
            continue
        kind = type_of(name) if values.ndim == 2 else GGUFType.F32
        writer.add_tensor(gguf_name(name), values if stored else quantize(values, kind), raw_dtype=kind)
    for name, found in experts.items():
        in_order = [each for _, each, _ in sorted(found, key=lambda one: one[0])]
        writer.add_tensor(name, np.stack(in_order), raw_dtype=found[0][2])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: gguf.GGUFWriter, family: str, config: PretrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if family != "qwen2":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if family == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if family == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(1)
    writer.add_token_list([f"<{i}>" for i in range(config.vocab_size)])
