"""The stack that all families here share: embedding, layers, norm, LM head. A family says what a layer is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.layers.attention import Attention, AttentionInput
from tokenspeed.layers.embedding import Embedding, LMHead
from tokenspeed.layers.forward import ForwardInput, LayerKV
from tokenspeed.layers.mlp import GatedMLP
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.layers.moe import MoE
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.fields import DecoderShape
from tokenspeed.parallel.placement import AnyTokens, Boundary, Replicate

ATTENTION = "attn"

FeedForward = GatedMLP | MoE


class DecoderLayer(Module):
    """x += attention(norm(x)); x += mlp(norm(x)). The sums ride on the norms."""

    def __init__(self, ctx: BuildContext, shape: DecoderShape, self_attn: Attention, mlp: FeedForward) -> None:
        super().__init__()
        assert mlp.boundary is not None
        self.boundary = Boundary(takes=AnyTokens(), gives=mlp.boundary.gives)
        hidden, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm = RMSNorm(ctx.inside("input_layernorm"), hidden, eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(ctx.inside("post_attention_layernorm"), hidden, eps)
        self.mlp = mlp
        # Kept apart from the modules, which torch looks for longer than some of them compute.
        self._decode = self_attn.decode, self.input_layernorm, mlp.decode, self.post_attention_layernorm

    def stages(self) -> Iterable[tuple[str, Module]]:
        return (
            ("input_layernorm", self.input_layernorm),
            ("self_attn", self.self_attn),
            ("post_attention_layernorm", self.post_attention_layernorm),
            ("mlp", self.mlp),
        )

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, inputs: AttentionInput, kv: LayerKV
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x and residual [T, H], whose sum is the stream → the same."""
        x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(x, inputs, kv)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual

    def decode(
        self, x: torch.Tensor, residual: torch.Tensor | None, inputs: AttentionInput, kv: LayerKV
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `forward`, of a step of decode rows alone."""
        attend, first_norm, feed, second_norm = self._decode
        x, residual = attend(x, first_norm, residual, inputs, kv)
        return feed(x, second_norm, residual, inputs.num_tokens)


class Decoder(CausalLM):
    """A model made of `layer(ctx, i)`, its tensors under `model.layers.i`; `ignored` matches more names to skip.

    Each group of ranks that attends together is handed the token ids of its own rows, and gets their logits.
    """

    boundary = Boundary(takes=Replicate(ATTENTION), gives=Replicate(ATTENTION))

    def __init__(
        self,
        config: ModelConfig,
        ctx: BuildContext,
        shape: DecoderShape,
        layer: Callable[[BuildContext, int], DecoderLayer],
        *,
        ignored: Iterable[str] = (),
    ) -> None:
        super().__init__(config, ctx)
        body = ctx.inside("model")
        self.embed_tokens = Embedding(body.inside("embed_tokens"), shape.vocab_size, shape.hidden_size)
        self.layers = [layer(body.inside(f"layers.{i}"), i) for i in range(shape.num_layers)]
        self.registered = nn.ModuleList(self.layers)
        self.norm = RMSNorm(body.inside("norm"), shape.hidden_size, shape.rms_norm_eps)
        tied = self.embed_tokens.weight if shape.tied else None
        self.lm_head = LMHead(ctx.inside("lm_head"), shape.vocab_size, shape.hidden_size, tied=tied)
        self.kv_spec = [layer.self_attn.kv_spec for layer in self.layers]
        # Old exports carry the rotary frequencies; a tied model may carry its table twice.
        skipped = [r".*\.rotary_emb\.inv_freq", *ignored]
        if shape.tied:
            skipped.append(re.escape(ctx.name("lm_head.weight")))
        self.ignored = re.compile("|".join(skipped))

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
        decodes = not attention.prefill.num_rows
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, residual = (layer.decode if decodes else layer)(x, residual, attention, layer_kv)
        hidden: torch.Tensor = self.norm(x, residual)[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lm_head(hidden)
        return out
