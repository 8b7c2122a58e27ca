"""The stack that all families here share: embedding, layers, norm, LM head. A family says what a layer is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from tokenspeed.checkpoint.config import ModelConfig
from tokenspeed.kernels import ops
from tokenspeed.layers.attention import Attention, AttentionInput, GQAAttention, GqaSizes, cache_rows
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
DenseSizes = tuple[GqaSizes, int]


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

    @property
    def dense(self) -> tuple[DenseSizes, ops.DenseLayer] | None:
        """What it is made of, for all layers as one op; None with latent attention or experts."""
        attention, mlp = self.self_attn, self.mlp
        if not isinstance(attention, GQAAttention) or not isinstance(mlp, GatedMLP):
            return None
        weights, head_eps, scale = attention.in_stack
        first, second = self.input_layernorm, self.post_attention_layernorm
        made_of = ops.DenseLayer(
            first.weight, weights, head_eps, scale, second.weight, mlp.weights_of_block, first.eps
        )
        return (attention.sizes, mlp.intermediate_size), made_of

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


class DenseStack:
    """All layers and the last norm in a decode step, as one op."""

    def __init__(
        self, ctx: BuildContext, sizes: DenseSizes, layers: tuple[ops.DenseLayer, ...], norm: RMSNorm
    ) -> None:
        gqa, intermediate_size = sizes
        self._run = ops.stack_decode(ctx.target, intermediate_size=intermediate_size, **gqa._asdict())
        self._layers, self._gain, self._eps = layers, norm.weight, norm.eps

    @classmethod
    def of(cls, ctx: BuildContext, layers: Sequence[DecoderLayer], norm: RMSNorm) -> DenseStack | None:
        """None where a layer is not dense, or has other sizes than the first."""
        parts = [part for layer in layers if (part := layer.dense) is not None]
        if len(parts) < len(layers) or len({sizes for sizes, _ in parts}) != 1:
            return None
        return cls(ctx, parts[0][0], tuple(made_of for _, made_of in parts), norm)

    def __call__(self, x: torch.Tensor, rows: ops.CacheRows, kv: Sequence[LayerKV]) -> torch.Tensor:
        """x [R, H] of R rows of one token each → hidden states [R, H] after the last norm."""
        return self._run(x, self._layers, kv, rows, self._gain, self._eps)


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
        self._stack = DenseStack.of(ctx, self.layers, self.norm)
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
        x: torch.Tensor = self.embed_tokens(inputs.token_ids)
        decodes = inputs.num_decode == len(inputs.query_lens)
        if decodes and self._stack is not None:
            return self._stack(x, cache_rows(inputs), kv)
        attention = AttentionInput.of(inputs)
        residual: torch.Tensor | None = None
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, residual = (layer.decode if decodes else layer)(x, residual, attention, layer_kv)
        hidden: torch.Tensor = self.norm(x, residual)[0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lm_head(hidden)
        return out
