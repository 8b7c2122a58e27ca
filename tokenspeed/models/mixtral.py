"""Mixtral: Llama's attention, and experts in every layer."""

from __future__ import annotations

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.layers.module import BuildContext
from tokenspeed.layers.moe import ExpertNames, MoE, Routing
from tokenspeed.models.decoder import Decoder, DecoderLayer
from tokenspeed.models.fields import GQA, DecoderShape, at_most, full_attention_only, size

NAMES = ExpertNames(gate="w1", up="w3", down="w2")


class MixtralForCausalLM(Decoder):
    """The weights of the chosen experts sum to 1."""

    def __init__(self, config: ModelConfig, ctx: BuildContext) -> None:
        full_attention_only(config)
        shape, gqa, width = DecoderShape.of(config), GQA.of(config, ctx), size(config, "intermediate_size")
        routing = Routing(
            num_experts=size(config, "num_local_experts"),
            top_k=size(config, "num_experts_per_tok"),
            normalise=True,
        )
        at_most(config, "num_experts_per_tok", routing.top_k, routing.num_experts, "num_local_experts")

        def layer(ctx: BuildContext, index: int) -> DecoderLayer:
            moe = MoE(ctx.inside("block_sparse_moe"), shape.hidden_size, width, routing, names=NAMES)
            return DecoderLayer(ctx, shape, gqa.attention(ctx, qkv_bias=False, out_bias=False), moe)

        super().__init__(config, ctx, shape, layer)
