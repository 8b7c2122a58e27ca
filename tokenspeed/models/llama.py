"""The Llama family: Llama 1 to 3, SmolLM, and whatever else ships as `LlamaForCausalLM`."""

from __future__ import annotations

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.layers.mlp import GatedMLP
from tokenspeed.layers.module import BuildContext
from tokenspeed.models.decoder import Decoder, DecoderLayer
from tokenspeed.models.fields import GQA, DecoderShape, size, switch


class LlamaForCausalLM(Decoder):
    """Grouped-query attention and a gated MLP, with biases where the checkpoint says so."""

    def __init__(self, config: ModelConfig, ctx: BuildContext) -> None:
        shape, gqa = DecoderShape.of(config), GQA.of(config, ctx)
        width = size(config, "intermediate_size")
        attention_bias, mlp_bias = switch(config, "attention_bias"), switch(config, "mlp_bias")

        def layer(ctx: BuildContext, index: int) -> DecoderLayer:
            attention = gqa.attention(ctx, qkv_bias=attention_bias, out_bias=attention_bias)
            mlp = GatedMLP(ctx.inside("mlp"), shape.hidden_size, width, bias=mlp_bias)
            return DecoderLayer(ctx, shape, attention, mlp)

        super().__init__(config, ctx, shape, layer)
