"""Write a random checkpoint of a real model's shape: `python scripts/make_checkpoint.py v2l FOLDER`.

config.json, safetensors shards and a byte-level tokenizer with a chat template, so that it can be served. The
weights spread tokens over the experts (`tokenspeed/checkpoint/random_weights.py`); they are made on a GPU where there
is one. `--config-only` leaves the weights out, for `--load-format dummy`.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.random_weights import randomise
from tokenspeed.checkpoint.source import Source
from tokenspeed.checkpoint.weights import tensor_shapes
from tokenspeed.errors import ConfigError
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.registry import build_model

SHARD_BYTES = 2 << 30
WRITERS = 4
DTYPES = {"bfloat16": ("BF16", torch.bfloat16), "float32": ("F32", torch.float32)}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
TINY_LATENT: dict[str, Any] = TINY | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
}
TINY_GROUPS = {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "q_lora_rank": 48}


def yarn(factor: float, original: int, mscale: float, beta_fast: int = 32) -> dict[str, object]:
    """DeepSeek's way to longer contexts."""
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
        "beta_fast": beta_fast,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # DeepSeek-V2-Lite, 15.7 B parameters.
    "v2l": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 163840,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "rope_scaling": yarn(40, 4096, 0.707),
    },
    # DeepSeek-V3 and R1, 671 B parameters: with --config-only, to plan for (python -m tokenspeed.parallel).
    "v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 163840,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_scaling": yarn(40, 4096, 1.0),
    },
    # Kimi K2, 1,026 B parameters; 2.1 TB in bfloat16, of which --layers takes a slice: a layer of experts has 34.1 GB,
    # embedding, head and the dense layer 5.7. 13 layers are 104 GB on each of four ranks that cut attention and 111
    # where it has own tokens, beside 24 and 6 GB of latents of 32 rows × 50,000: four GPUs of 141 GB. Of 80 GB: 7.
    "k2": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "vocab_size": 163840,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_hidden_layers": 61,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "max_position_embeddings": 131072,
        "rope_theta": 50000.0,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 384,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "rope_scaling": yarn(32, 4096, 1.0, beta_fast=1),
    },
    "llama-8b": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    },
    "tiny-llama": {**TINY, "architectures": ["LlamaForCausalLM"]},
    "tiny-qwen2": {**TINY, "architectures": ["Qwen2ForCausalLM"]},
    "tiny-qwen3": {**TINY, "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "tiny-mixtral": {
        **TINY,
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "tiny-qwen3-moe": {
        **TINY,
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
    "tiny-v2l": {
        **TINY_LATENT,
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "rope_scaling": yarn(32, 128, 0.707),
    },
    "tiny-v2": {
        **TINY_LATENT,
        **TINY_GROUPS,
        "architectures": ["DeepseekV2ForCausalLM"],
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 4.0,
        "rope_scaling": yarn(32, 128, 0.707),
    },
    "tiny-v3": {
        **TINY_LATENT,
        **TINY_GROUPS,
        "architectures": ["DeepseekV3ForCausalLM"],
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_scaling": yarn(32, 128, 1.0),
    },
    "tiny-k2": {
        **TINY_LATENT,
        **TINY_GROUPS,
        "architectures": ["DeepseekV3ForCausalLM"],
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "rope_scaling": yarn(32, 128, 1.0),
    },
}
"""config.json of each shape; what all have in common is added by `config_of`."""

TYPES = {
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}


def config_of(preset: str, dtype: str, num_layers: int | None) -> dict[str, Any]:
    """config.json of a preset."""
    fields: dict[str, Any] = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    fields |= PRESETS[preset]
    fields |= {"tie_word_embeddings": False, "dtype": dtype, "bos_token_id": 256, "eos_token_id": 258}
    fields["model_type"] = TYPES[fields["architectures"][0]]
    return fields if num_layers is None else fields | {"num_hidden_layers": num_layers}


def write_tokenizer(folder: Path) -> None:
    """One token a byte, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[2],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


Shapes = dict[str, tuple[int, ...]]


def needed_tensors(folder: Path) -> Shapes:
    """What the model of the folder's config.json reads, in its order."""
    config = read_model_config(Source("hf", folder, folder.name))
    ctx = BuildContext.of(device=torch.device("meta"), dtype=torch.bfloat16, max_positions=16, block_size=64)
    return tensor_shapes(build_model(config, ctx).weights())


def in_shards(tensors: Shapes, item_size: int, limit: int) -> Iterator[Shapes]:
    """Neighbours together, at most `limit` bytes unless one tensor is larger."""
    shard: Shapes = {}
    num_bytes = 0
    for name, shape in tensors.items():
        size = math.prod(shape) * item_size
        if shard and num_bytes + size > limit:
            yield shard
            shard, num_bytes = {}, 0
        shard[name] = shape
        num_bytes += size
    yield shard


def write_shard(path: Path, tensors: Shapes, dtype: str, device: torch.device, seed: int) -> int:
    """Write one safetensors file, tensor by tensor, so that no more than one is in memory. Returns its bytes."""
    word, kind = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": word, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator(device).manual_seed(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            values = torch.empty(shape, dtype=kind, device=device)
            randomise(name, values, generator)
            file.write(values.cpu().view(torch.uint8).numpy().data)
    return end


def write_weights(folder: Path, dtype: str, device: torch.device, seed: int, shard_bytes: int) -> int:
    """Every tensor that the model of `folder` needs. The same seed gives the same files. Returns their bytes."""
    tensors = needed_tensors(folder)
    shards = list(in_shards(tensors, DTYPES[dtype][1].itemsize, shard_bytes))
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    with ThreadPoolExecutor(WRITERS) as writers:
        jobs = [
            writers.submit(write_shard, folder / name, shard, dtype, device, seed * 100_003 + i)
            for i, (name, shard) in enumerate(zip(names, shards, strict=True))
        ]
        total = sum(job.result() for job in jobs)
    if len(shards) > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit status."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint of a real model's shape.")
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--device", help="where the numbers are made; default: a GPU if there is one")
    parser.add_argument("--layers", type=int, help="fewer layers than the real model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-bytes", type=int, default=SHARD_BYTES)
    parser.add_argument("--config-only", action="store_true", help="no weights: for --load-format dummy")
    asked = parser.parse_args(arguments)
    start = time.perf_counter()
    try:
        asked.folder.mkdir(parents=True, exist_ok=True)
        if any(asked.folder.iterdir()):
            parser.error(f"{asked.folder} is not empty")
        config = config_of(asked.preset, asked.dtype, asked.layers)
        (asked.folder / "config.json").write_text(json.dumps(config, indent=2))
        write_tokenizer(asked.folder)
        if asked.config_only:
            print(f"{asked.folder}: {asked.preset}, without weights")
            return 0
        device = torch.device(asked.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        total = write_weights(asked.folder, asked.dtype, device, asked.seed, asked.shard_bytes)
    except (ConfigError, OSError, RuntimeError) as error:
        print(f"make_checkpoint: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    seconds = time.perf_counter() - start
    print(f"{asked.folder}: {asked.preset}, {total / 1e9:.2f} GB in {seconds:.1f} s, made on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
