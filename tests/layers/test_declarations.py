"""Every layer declares its boundary, and every parameter where it comes from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.layers.forward import KVSpec
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.models.registry import build_model
from tokenspeed.parallel.compiler import compile_model
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.placement import Shard
from tokenspeed.parallel.shards import Piece
from tokenspeed.parallel.steps import Norm, Run, Select

HF = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "attention_bias": True,
}
DEEPSEEK = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
ARCHITECTURES: dict[str, dict[str, object]] = {
    "LlamaForCausalLM": HF,
    "Qwen3ForCausalLM": HF,
    "MixtralForCausalLM": HF | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV2ForCausalLM": HF | DEEPSEEK,
    "DeepseekV3ForCausalLM": HF | DEEPSEEK | {"q_lora_rank": 24, "norm_topk_prob": True},
}


def build(architecture: str = "LlamaForCausalLM") -> Any:
    config = ModelConfig(
        file="config.json",
        architecture=architecture,
        hf=ARCHITECTURES[architecture],
        vocab_size=64,
        max_position_embeddings=128,
        dtype="float32",
        eos_token_ids=(),
        bos_token_id=None,
        generation_defaults={},
    )
    ctx = BuildContext.of(device=torch.device("cpu"), dtype=torch.float32, max_positions=64, block_size=16)
    return build_model(config, ctx)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_module_declares_its_boundary(architecture: str) -> None:
    modules = [module for module in build(architecture).modules() if isinstance(module, Module)]
    assert len(modules) > 20
    assert all(module.boundary is not None for module in modules)


def reached(module: Module) -> list[Module]:
    return [module] + [inner for _, part in module.stages() for inner in reached(part)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_data_flow_names_every_module_once(architecture: str) -> None:
    model = build(architecture)
    in_flow = reached(model)
    assert len(in_flow) == len(set(in_flow))
    assert set(in_flow) == {module for module in model.modules() if isinstance(module, Module)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_one_rank_a_model_is_its_modules_in_the_order_of_the_data_flow(architecture: str) -> None:
    layers = [
        step
        for layer in ("m.layers.0", "m.layers.1")
        for step in (
            Norm(f"{layer}.input_layernorm"),
            Run(f"{layer}.self_attn", "x"),
            Norm(f"{layer}.post_attention_layernorm"),
            Run(f"{layer}.mlp", "x"),
        )
    ]
    program = compile_model(build(architecture), Mesh.single(), "m")
    steps = [Run("m.embed_tokens", "x"), *layers, Norm("m.norm"), Select(), Run("m.lm_head", "x")]
    assert [planned.step for planned in program.steps] == steps
    assert not any(planned.sent for planned in program.steps)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_declared_once_and_filled_entirely(architecture: str) -> None:
    model = build(architecture)
    weights = list(model.weights())
    assert {id(weight.parameter) for weight in weights} == {id(parameter) for parameter in model.parameters()}
    assert len(weights) == len({id(weight.parameter) for weight in weights})
    for weight in weights:
        covered = torch.zeros(weight.parameter.shape, dtype=torch.int32)
        for piece in weight.pieces:
            covered[piece.at] += 1
        assert (covered == 1).all()


def test_fused_weights_name_their_checkpoint_tensors_in_order() -> None:
    attention = build().layers[1].self_attn
    weight, bias = (w for w in attention.weights() if w.parameter.shape[0] == 80)
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    assert [piece.source for piece in weight.pieces] == [f"{name}.weight" for name in names]
    assert [piece.source for piece in bias.pieces] == [f"{name}.bias" for name in names]
    assert [piece.at for piece in weight.pieces] == [(slice(0, 48),), (slice(48, 64),), (slice(64, 80),)]
    assert weight.shares == bias.shares == (Shard("attn", 0),)


def test_shared_experts_stand_last_each_filled_by_its_part_of_one_tensor() -> None:
    experts = build("DeepseekV2ForCausalLM").layers[1].mlp.experts
    gate_up, down = experts.weights()
    assert gate_up.parameter.shape == (6, 24, 48) and down.parameter.shape == (6, 48, 12)
    shared = "model.layers.1.mlp.shared_experts"
    first, second = slice(0, 12), slice(12, 24)
    assert gate_up.pieces[-4:] == (
        Piece(f"{shared}.gate_proj.weight", (4, first), (first,)),
        Piece(f"{shared}.up_proj.weight", (4, second), (first,)),
        Piece(f"{shared}.gate_proj.weight", (5, first), (second,)),
        Piece(f"{shared}.up_proj.weight", (5, second), (second,)),
    )
    assert down.pieces[-1] == Piece(f"{shared}.down_proj.weight", (5,), (slice(None), second))
    dealt = Shard("moe_ep", 0)
    assert (gate_up.shares, down.shares) == ((dealt, Shard("moe_tp", 1)), (dealt, Shard("moe_tp", 2)))


def test_what_latent_attention_caches_is_one_vector_a_token() -> None:
    model = build("DeepseekV3ForCausalLM")
    assert model.kv_spec == [KVSpec((("latent", (24,)),))] * 2
