"""The Llama family: Llama 1 to 3, SmolLM, and whatever else ships as `LlamaForCausalLM`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from reprlib import repr as _short

import torch
from torch import nn

from tokenspeed.checkpoint.config import ModelConfig, flag, positive_int
from tokenspeed.errors import CheckpointError
from tokenspeed.layers.attention import AttentionInput, GQAAttention
from tokenspeed.layers.embedding import VOCABULARY, Embedding, LMHead
from tokenspeed.layers.forward import ForwardInput, LayerKV
from tokenspeed.layers.mlp import GatedMLP
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.layers.rotary import Rope, RotaryTable
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.parallel.placement import Boundary, Partial, Replicate, Shard


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The fields of config.json that the family uses, checked."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tied: bool
    attention_bias: bool
    mlp_bias: bool

    @classmethod
    def of(cls, config: ModelConfig) -> LlamaConfig:
        """Raises `CheckpointError` naming the file and the field."""
        hf, file = config.hf, config.file
        hidden, heads = positive_int(hf, "hidden_size", file), positive_int(hf, "num_attention_heads", file)
        kv_heads = heads if hf.get("num_key_value_heads") is None else positive_int(hf, "num_key_value_heads", file)
        if heads % kv_heads:
            raise CheckpointError(
                f"{file}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"
            )
        if hf.get("head_dim") is None and hidden % heads:
            raise CheckpointError(f"{file}: hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})")
        head_dim = hidden // heads if hf.get("head_dim") is None else positive_int(hf, "head_dim", file)
        if head_dim % 2:
            raise CheckpointError(f"{file}: head_dim ({head_dim}) must be even")
        if hf.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{file}: hidden_act {_short(hf['hidden_act'])} is not supported (silu)")
        eps = hf.get("rms_norm_eps", 1e-6)
        if not isinstance(eps, int | float) or isinstance(eps, bool) or not math.isfinite(eps) or eps < 0:
            raise CheckpointError(f"{file}: rms_norm_eps must be a number of at least 0, got {_short(eps)}")
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=hidden,
            intermediate_size=positive_int(hf, "intermediate_size", file),
            num_layers=positive_int(hf, "num_hidden_layers", file),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=eps,
            rope=Rope.from_hf(hf, head_dim, file),
            tied=flag(hf, "tie_word_embeddings", file),
            attention_bias=flag(hf, "attention_bias", file),
            mlp_bias=flag(hf, "mlp_bias", file),
        )


class LlamaLayer(Module):
    """x += attention(norm(x)); x += mlp(norm(x)). The sums ride on the norms."""

    boundary = Boundary(takes=Replicate("attn"), gives=Partial("dense"))

    def __init__(self, ctx: BuildContext, config: LlamaConfig, rotary: RotaryTable) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(ctx.inside("input_layernorm"), hidden, eps, axis="attn")
        self.self_attn = GQAAttention(
            ctx.inside("self_attn"),
            hidden_size=hidden,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary=rotary,
            qkv_bias=config.attention_bias,
            out_bias=config.attention_bias,
        )
        self.post_attention_layernorm = RMSNorm(ctx.inside("post_attention_layernorm"), hidden, eps, axis="dense")
        self.mlp = GatedMLP(ctx.inside("mlp"), hidden, config.intermediate_size, bias=config.mlp_bias)

    def stages(self) -> Iterable[tuple[str, Module]]:
        return (
            ("input_layernorm", self.input_layernorm),
            ("self_attn", self.self_attn),
            ("post_attention_layernorm", self.post_attention_layernorm),
            ("mlp", self.mlp),
        )

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, inputs: AttentionInput, kv: LayerKV
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x and residual [T, H], whose sum is the stream → the same."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, inputs, kv)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class LlamaForCausalLM(CausalLM):
    """Embedding, layers, norm, LM head."""

    boundary = Boundary(takes=Replicate(VOCABULARY), gives=Shard(VOCABULARY, -1))

    def __init__(self, model_config: ModelConfig, ctx: BuildContext) -> None:
        super().__init__(model_config, ctx)
        config = LlamaConfig.of(model_config)
        body = ctx.inside("model")
        rotary = RotaryTable(config.rope, config.head_dim, ctx.max_positions, ctx.device)
        self.embed_tokens = Embedding(body.inside("embed_tokens"), config.vocab_size, config.hidden_size)
        self.layers = [LlamaLayer(body.inside(f"layers.{i}"), config, rotary) for i in range(config.num_layers)]
        self.registered = nn.ModuleList(self.layers)
        self.norm = RMSNorm(body.inside("norm"), config.hidden_size, config.rms_norm_eps, axis=VOCABULARY)
        tied = self.embed_tokens.weight if config.tied else None
        self.lm_head = LMHead(ctx.inside("lm_head"), config.vocab_size, config.hidden_size, tied=tied)
        self.kv_spec = [layer.self_attn.kv_spec for layer in self.layers]
        # Old exports carry the rotary frequencies; a tied model may carry its table twice.
        self.ignored = re.compile(r".*\.rotary_emb\.inv_freq" + (r"|lm_head\.weight" if config.tied else ""))

    def stages(self) -> Iterable[tuple[str, Module]]:
        yield "embed_tokens", self.embed_tokens
        for i, layer in enumerate(self.layers):
            yield f"layers.{i}", layer
        yield "norm", self.norm
        yield "lm_head", self.lm_head

    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        attention = AttentionInput.of(inputs)
        x: torch.Tensor = self.embed_tokens(inputs.token_ids)
        residual: torch.Tensor | None = None
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, residual = layer(x, residual, attention, layer_kv)
        hidden: torch.Tensor = self.norm(x, residual)[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lm_head(hidden)
        return out
