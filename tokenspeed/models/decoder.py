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
from tokenspeed.layers.forward import ForwardInput, LayerKV, TokenInput
from tokenspeed.layers.mlp import GatedMLP
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.layers.moe import MoE
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.models.causal_lm import CausalLM, Pieces
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

    def enter(
        self, x: torch.Tensor, residual: torch.Tensor | None, tokens: TokenInput, kv: LayerKV
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x and residual [T, H], whose sum is the stream → queries for the attention, the stream."""
        x, residual = self.input_layernorm(x, residual)
        return self.self_attn.enter(x, tokens, kv), residual

    def leave(
        self, attended: torch.Tensor, residual: torch.Tensor | None, tokens: TokenInput
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the attention gave and the stream → two tensors [T, H] whose sum is the stream."""
        x, residual = self.post_attention_layernorm(self.self_attn.leave(attended), residual)
        return self.mlp(x, tokens.num_tokens), residual

    def decode(
        self, x: torch.Tensor, residual: torch.Tensor | None, inputs: AttentionInput, kv: LayerKV
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x and residual [R, H], whose sum is the stream, of a step of decode rows alone → the same."""
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
        if inputs.num_decode == len(inputs.query_lens):
            return self._decode(inputs, kv)
        attention, tokens = AttentionInput.of(inputs), inputs.tokens
        x: torch.Tensor | None = None
        residual: torch.Tensor | None = None
        for index in range(len(self.layers)):
            q, residual = self.piece(index, x, residual, tokens, kv)
            x = self.attend(index, q, attention, kv, None)
            del q  # as large as what the MLP is about to make
        return self.piece(len(self.layers), x, residual, tokens, kv)[0]

    def _decode(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        """Of decode rows alone: blocks as composites."""
        x: torch.Tensor = self.embed_tokens(inputs.token_ids)
        if self._stack is not None:
            return self._stack(x, cache_rows(inputs), kv)
        attention = AttentionInput.of(inputs)
        residual: torch.Tensor | None = None
        for layer, layer_kv in zip(self.layers, kv, strict=True):
            x, residual = layer.decode(x, residual, attention, layer_kv)
        hidden: torch.Tensor = self.norm(x, residual)[0]
        return hidden

    @property
    def pieces(self) -> Pieces | None:
        widths = {layer.self_attn.attended_width for layer in self.layers}
        return self if len(widths) == 1 else None

    @property
    def num_pieces(self) -> int:
        return len(self.layers) + 1

    @property
    def attended_width(self) -> int:
        return self.layers[0].self_attn.attended_width

    def piece(
        self, index: int, x: torch.Tensor | None, residual: torch.Tensor | None, tokens: TokenInput,
        kv: Sequence[LayerKV],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        x = self.embed_tokens(tokens.token_ids) if x is None else x
        if index:
            x, residual = self.layers[index - 1].leave(x, residual, tokens)
        if index < len(self.layers):
            return self.layers[index].enter(x, residual, tokens, kv[index])
        return self.norm(x, residual)[0], None

    def attend(
        self, index: int, q: torch.Tensor, inputs: AttentionInput, kv: Sequence[LayerKV], out: torch.Tensor | None
    ) -> torch.Tensor:
        return self.layers[index].self_attn.attend(q, inputs, kv[index], out)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.lm_head(hidden)
        return out
