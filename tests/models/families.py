"""Small random checkpoints of every family, written by `transformers`, which is also what they are compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.toy import VOCAB_SIZE, write_tokenizer

MAX_POSITIONS = 1024

COMMON: dict[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
HEADS = {"num_key_value_heads": 2, "head_dim": 16}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}
LATENT = {
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 24,
    "v_head_dim": 20,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
}
V2 = {**LATENT, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}
V3 = {**LATENT, "num_mtp_layers": 0, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}


LLAMA = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
"""Of a toy Llama whose heads can be cut in four."""


@dataclass(frozen=True)
class Family:
    """A configuration class of `transformers`, its model class, and what they are told."""

    config: type[transformers.PretrainedConfig]
    model: type[transformers.PreTrainedModel]
    settings: Mapping[str, Any]


FAMILIES: dict[str, Family] = {
    "qwen2": Family(transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"num_key_value_heads": 2}),
    "qwen2-tied-yarn": Family(
        transformers.Qwen2Config,
        transformers.Qwen2ForCausalLM,
        {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "qwen3": Family(transformers.Qwen3Config, transformers.Qwen3ForCausalLM, HEADS | {"head_dim": 32}),
    "mixtral": Family(
        transformers.MixtralConfig,
        transformers.MixtralForCausalLM,
        HEADS | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3-moe": Family(
        transformers.Qwen3MoeConfig,
        transformers.Qwen3MoeForCausalLM,
        HEADS
        | {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "deepseek-v2-lite": Family(
        transformers.DeepseekV2Config,
        transformers.DeepseekV2ForCausalLM,
        V2 | {"q_lora_rank": None, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 3},
    ),
    "deepseek-v2": Family(
        transformers.DeepseekV2Config,
        transformers.DeepseekV2ForCausalLM,
        V2
        | GROUPS
        | {
            "q_lora_rank": 48,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 4.0,
        },
    ),
    "deepseek-v3": Family(
        transformers.DeepseekV3Config,
        transformers.DeepseekV3ForCausalLM,
        V3 | GROUPS | {"q_lora_rank": 48, "n_shared_experts": 1, "routed_scaling_factor": 2.5},
    ),
    "kimi-k2": Family(
        transformers.DeepseekV3Config,
        transformers.DeepseekV3ForCausalLM,
        V3
        | {
            "q_lora_rank": 48,
            "n_routed_experts": 12,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 4,
            "n_shared_experts": 1,
            "routed_scaling_factor": 2.827,
            "attention_bias": True,
        },
    ),
}
LATENT_FAMILIES = [name for name in FAMILIES if name.startswith(("deepseek", "kimi"))]
MOE_FAMILIES = [*LATENT_FAMILIES, "mixtral", "qwen3-moe"]


def write(folder: Path, name: str, *, seed: int = 0, **changes: object) -> transformers.PreTrainedModel:
    """A random model of the family with a tokenizer in `folder`; returns it as `transformers` runs it, float32.

    Norms, biases and correction biases, constant when fresh, are random too. Kimi K2.5 is Kimi K2 wrapped.
    """
    folder.mkdir(parents=True, exist_ok=True)
    family = FAMILIES["kimi-k2" if name == "kimi-k2.5" else name]
    torch.manual_seed(seed)
    config = family.config(**{**COMMON, **family.settings, **changes})
    model = family.model(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed + 5)
    for tensor in (parameter for parameter in model.parameters() if parameter.dim() == 1):
        tensor.data.add_(torch.rand(tensor.shape, generator=generator) - 0.5)
    for key, tensor in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            # Small beside the scores, which lie between 0 and 1: larger, the same experts would always be chosen.
            tensor.add_(0.2 * (torch.rand(tensor.shape, generator=generator) - 0.5))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if name == "kimi-k2.5":
        _wrap(folder)
    return model


def _wrap(folder: Path) -> None:
    """What Kimi K2.5 makes of its text model: other names, a nested description, and parts that see images."""
    path = folder / "model.safetensors"
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(path).items()}
    seeing = {"vision_tower.patch_embed.proj.weight": torch.ones(4), "mm_projector.proj.0.bias": torch.ones(2)}
    save_file(tensors | seeing, path)
    text = json.loads((folder / "config.json").read_text())
    text["architectures"] = ["DeepseekV3ForCausalLM"]
    outer = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "dtype": text.pop("dtype")}
    (folder / "config.json").write_text(json.dumps({**outer, "text_config": text, "vision_config": {"patch_size": 14}}))
