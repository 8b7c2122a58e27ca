"""DeepSeek V2, V2-Lite, V3 and R1, and the text part of Kimi K2 and K2.5: latent attention and routed experts."""

from __future__ import annotations

from reprlib import repr as _short

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.errors import CheckpointError
from tokenspeed.layers.mla import MLAAttention, MLAShape
from tokenspeed.layers.mlp import GatedMLP
from tokenspeed.layers.module import BuildContext
from tokenspeed.layers.moe import MoE, Routing
from tokenspeed.layers.rotary import Rope, RotaryTable
from tokenspeed.models.decoder import Decoder, DecoderLayer
from tokenspeed.models.fields import DecoderShape, at_most, count, divisible, number, size, switch

LATENT_EPS = 1e-6
"""Of the norms on the latents, whatever rms_norm_eps says: the models were trained with their class's default."""

METHODS = {("softmax", "greedy"), ("softmax", "group_limited_greedy"), ("sigmoid", "noaux_tc")}
"""scoring_func and topk_method, as they occur together."""


def mla_shape(config: ModelConfig) -> MLAShape:
    """The sizes of latent attention. Raises `CheckpointError` naming the field."""
    rope_dim = size(config, "qk_rope_head_dim")
    if rope_dim % 2:
        raise CheckpointError(f"{config.file}: qk_rope_head_dim ({rope_dim}) must be even")
    return MLAShape(
        num_heads=size(config, "num_attention_heads"),
        kv_lora_rank=size(config, "kv_lora_rank"),
        rope_dim=rope_dim,
        nope_dim=size(config, "qk_nope_head_dim"),
        v_dim=size(config, "v_head_dim"),
        q_lora_rank=None if config.hf.get("q_lora_rank") is None else size(config, "q_lora_rank"),
    )


def routing(config: ModelConfig, *, scoring: str, method: str) -> Routing:
    """How tokens choose their experts. `scoring` and `method` hold where the file is silent."""
    scoring, method = (
        config.hf.get(name) or default for name, default in (("scoring_func", scoring), ("topk_method", method))
    )
    if (scoring, method) not in METHODS:
        raise CheckpointError(
            f"{config.file}: topk_method {_short(method)} with scoring_func {_short(scoring)} is not supported"
        )
    grouped = method != "greedy"
    num_groups, top_groups = (count(config, name, 1) or 1 if grouped else 1 for name in ("n_group", "topk_group"))
    num_experts, top_k = size(config, "n_routed_experts"), size(config, "num_experts_per_tok")
    if num_groups > 1:
        divisible(config, "n_routed_experts", "n_group")
        at_most(config, "topk_group", top_groups, num_groups, "n_group")
    at_most(config, "num_experts_per_tok", top_k, num_experts // num_groups * top_groups, "the experts of topk_group")
    sigmoid, normalise = scoring == "sigmoid", switch(config, "norm_topk_prob")
    if normalise and not sigmoid:
        raise CheckpointError(f"{config.file}: norm_topk_prob with scoring_func softmax is not supported")
    return Routing(
        num_experts=num_experts,
        top_k=top_k,
        num_shared=count(config, "n_shared_experts"),
        num_groups=num_groups,
        top_groups=top_groups,
        scoring="sigmoid" if sigmoid else "softmax",
        normalise=normalise,
        scale=number(config, "routed_scaling_factor", 1.0),
        bias=sigmoid,
    )


class _DeepSeek(Decoder):
    """Dense layers first, then experts."""

    def __init__(
        self,
        config: ModelConfig,
        ctx: BuildContext,
        choice: Routing,
        *,
        interleaved: bool,
        ignored: tuple[str, ...] = (),
    ) -> None:
        shape, mla = DecoderShape.of(config), mla_shape(config)
        rope = Rope.from_hf(config.hf, mla.rope_dim, config.file)
        rotary = RotaryTable(rope, mla.rope_dim, ctx.max_positions, ctx.device)
        num_dense, every = count(config, "first_k_dense_replace"), count(config, "moe_layer_freq", 1) or 1
        expert_width, bias = size(config, "moe_intermediate_size"), switch(config, "attention_bias")

        def layer(ctx: BuildContext, index: int) -> DecoderLayer:
            attention = MLAAttention(
                ctx.inside("self_attn"),
                mla,
                hidden_size=shape.hidden_size,
                rotary=rotary,
                interleaved=interleaved,
                scale=mla.qk_dim**-0.5 * rope.softmax_scale,
                eps=LATENT_EPS,
                bias=bias,
            )
            mlp = ctx.inside("mlp")
            if index < num_dense or index % every:
                width = size(config, "intermediate_size")
                return DecoderLayer(ctx, shape, attention, GatedMLP(mlp, shape.hidden_size, width))
            return DecoderLayer(ctx, shape, attention, MoE(mlp, shape.hidden_size, expert_width, choice))

        # Layers behind the last predict further tokens for speculation; the model itself does without.
        drafts = range(shape.num_layers, shape.num_layers + count(config, "num_nextn_predict_layers"))
        skipped = (*ignored, *(rf".*\.layers\.{index}\..*" for index in drafts))
        super().__init__(config, ctx, shape, layer, ignored=skipped)


class DeepseekV2ForCausalLM(_DeepSeek):
    """Softmax scores, the best groups by their largest."""

    def __init__(self, config: ModelConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx, routing(config, scoring="softmax", method="greedy"), interleaved=True)


class DeepseekV3ForCausalLM(_DeepSeek):
    """Sigmoid scores with a correction bias for the choice. Kimi K2 ships under this name too."""

    def __init__(self, config: ModelConfig, ctx: BuildContext, *, ignored: tuple[str, ...] = ()) -> None:
        interleaved = config.hf.get("rope_interleave") is not False
        choice = routing(config, scoring="sigmoid", method="noaux_tc")
        super().__init__(config, ctx, choice, interleaved=interleaved, ignored=ignored)


class KimiK25ForConditionalGeneration(DeepseekV3ForCausalLM):
    """The text part of Kimi K2.5: tensors under `language_model`; those that see images are left out."""

    def __init__(self, config: ModelConfig, ctx: BuildContext) -> None:
        vision = (r"vision_tower\..*", r"mm_projector\..*")
        super().__init__(config, ctx.inside("language_model"), ignored=vision)
