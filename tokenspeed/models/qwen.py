"""Qwen2 (and 2.5), Qwen3 and Qwen3-MoE: Llama's layer with a bias on q, k and v, a norm of the heads, or experts."""

from __future__ import annotations

from reprlib import repr as _short

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.errors import CheckpointError
from tokenspeed.layers.mlp import GatedMLP
from tokenspeed.layers.module import BuildContext
from tokenspeed.layers.moe import MoE, Routing
from tokenspeed.models.decoder import Decoder, DecoderLayer
from tokenspeed.models.fields import GQA, DecoderShape, at_most, count, full_attention_only, size, switch


class Qwen2ForCausalLM(Decoder):
    """q, k and v always have a bias, the output projection never."""

    def __init__(self, config: ModelConfig, ctx: BuildContext) -> None:
        full_attention_only(config)
        shape, gqa, width = DecoderShape.of(config), GQA.of(config, ctx), size(config, "intermediate_size")

        def layer(ctx: BuildContext, index: int) -> DecoderLayer:
            attention = gqa.attention(ctx, qkv_bias=True, out_bias=False)
            return DecoderLayer(ctx, shape, attention, GatedMLP(ctx.inside("mlp"), shape.hidden_size, width))

        super().__init__(config, ctx, shape, layer)


class Qwen3ForCausalLM(Decoder):
    """A norm over each head of q and k."""

    def __init__(self, config: ModelConfig, ctx: BuildContext) -> None:
        full_attention_only(config)
        shape, gqa, width = DecoderShape.of(config), GQA.of(config, ctx), size(config, "intermediate_size")
        bias, eps = switch(config, "attention_bias"), shape.rms_norm_eps

        def layer(ctx: BuildContext, index: int) -> DecoderLayer:
            attention = gqa.attention(ctx, qkv_bias=bias, out_bias=bias, qk_norm_eps=eps)
            return DecoderLayer(ctx, shape, attention, GatedMLP(ctx.inside("mlp"), shape.hidden_size, width))

        super().__init__(config, ctx, shape, layer)


class Qwen3MoeForCausalLM(Decoder):
    """Qwen3 with experts in every `decoder_sparse_step`-th layer that `mlp_only_layers` does not name."""

    def __init__(self, config: ModelConfig, ctx: BuildContext) -> None:
        full_attention_only(config)
        shape, gqa = DecoderShape.of(config), GQA.of(config, ctx)
        bias, eps = switch(config, "attention_bias"), shape.rms_norm_eps
        experts_word = "num_experts" if "num_experts" in config.hf else "num_local_experts"
        routing = Routing(
            num_experts=size(config, experts_word),
            top_k=size(config, "num_experts_per_tok"),
            normalise=switch(config, "norm_topk_prob"),
        )
        at_most(config, "num_experts_per_tok", routing.top_k, routing.num_experts, experts_word)
        expert_width = size(config, "moe_intermediate_size")
        step = count(config, "decoder_sparse_step", 1)
        dense = config.hf.get("mlp_only_layers") or []
        if not isinstance(dense, list) or not all(isinstance(index, int) for index in dense):
            raise CheckpointError(f"{config.file}: mlp_only_layers must be a list of layers, got {_short(dense)}")

        def layer(ctx: BuildContext, index: int) -> DecoderLayer:
            attention = gqa.attention(ctx, qkv_bias=bias, out_bias=bias, qk_norm_eps=eps)
            mlp = ctx.inside("mlp")
            if index in dense or step == 0 or (index + 1) % step:
                width = size(config, "intermediate_size")
                return DecoderLayer(ctx, shape, attention, GatedMLP(mlp, shape.hidden_size, width))
            return DecoderLayer(ctx, shape, attention, MoE(mlp, shape.hidden_size, expert_width, routing))

        super().__init__(config, ctx, shape, layer)
