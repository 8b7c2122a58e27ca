"""Every layer declares its boundary, and every parameter where it comes from."""

from __future__ import annotations

import torch

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.models.llama import LlamaForCausalLM
from tokenspeed.parallel.compiler import compile_model
from tokenspeed.parallel.placement import Mesh, Shard

HF = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "attention_bias": True,
}


def build() -> LlamaForCausalLM:
    config = ModelConfig(
        file="config.json",
        architecture="LlamaForCausalLM",
        hf=HF,
        vocab_size=64,
        max_position_embeddings=128,
        dtype="float32",
        eos_token_ids=(),
        bos_token_id=None,
        generation_defaults={},
    )
    ctx = BuildContext.of(device=torch.device("cpu"), dtype=torch.float32, max_positions=64, block_size=16)
    return LlamaForCausalLM(config, ctx)


def test_every_module_declares_its_boundary() -> None:
    modules = [module for module in build().modules() if isinstance(module, Module)]
    assert len(modules) > 20
    assert all(module.boundary is not None for module in modules)


def reached(module: Module) -> list[Module]:
    return [module] + [inner for _, part in module.stages() for inner in reached(part)]


def test_the_data_flow_names_every_module_once() -> None:
    model = build()
    in_flow = reached(model)
    assert len(in_flow) == len(set(in_flow))
    assert set(in_flow) == {module for module in model.modules() if isinstance(module, Module)}


def test_the_model_compiles_on_one_rank_into_the_edges_of_its_layers() -> None:
    lines = compile_model(build(), Mesh.single(), "llama").explain().splitlines()
    # Between the parts: 3 in a layer, 2 in attention, 2 in the MLP; then embedding, 2 layers, norm, head.
    assert len(lines) == 2 * (3 + 2 + 2) + 4
    assert "llama.layers.0 → llama.layers.1: Partial(dense) → Replicate(attn)  [identity]" in lines


def test_every_parameter_is_declared_once_and_filled_entirely() -> None:
    model = build()
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
    assert weight.shard == Shard("attn", 0)
