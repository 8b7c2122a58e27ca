"""The blocks, written with ops. `Choose` says who answers each op: selection, or the references."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tokenspeed.kernels.block_weights import (
    CacheRows,
    DenseLayer,
    Edge,
    GqaWeights,
    MlaWeights,
    MlpWeights,
    MoeWeights,
)
from tokenspeed.kernels.forms import ROWS, form_of
from tokenspeed.kernels.registry import Kernel, Target, Traits, TraitValue
from tokenspeed.kernels.sampler_state import SamplerState


class Choose(Protocol):
    """The kernel of an op for a target and traits."""

    def __call__(self, op: str, target: Target, **traits: TraitValue) -> Kernel: ...


def linear_of(choose: Choose, target: Target, form: TraitValue) -> Kernel:
    """The product with a weight of this form."""
    return choose("linear", target) if form == ROWS else choose("packed_linear", target, matrix_form=form)


class _Block:
    """The edge that every block begins with."""

    def __init__(self, choose: Choose, target: Target) -> None:
        self.norm = choose("rms_norm", target)

    def enter(self, x: Tensor, edge: Edge | None) -> tuple[Tensor, Tensor | None]:
        if edge is None:
            return x, None
        y, residual = self.norm(x, edge.gain, edge.eps, edge.residual)
        return y, residual


class GqaBlock(_Block):
    def __init__(self, choose: Choose, target: Target, traits: Traits) -> None:
        super().__init__(choose, target)
        self.project, self.project_back = (linear_of(choose, target, traits[name]) for name in ("qkv_form", "out_form"))
        self.num_heads, self.num_kv_heads, self.head_dim = (
            int(traits[name]) for name in ("num_heads", "num_kv_heads", "head_dim")
        )
        self.rotary = choose("rotary", target, head_dim=self.head_dim, interleaved=traits["interleaved"])
        self.store = choose("kv_store", target)
        self.attend = choose(
            "mha_decode", target, num_heads=self.num_heads, num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim, block_size=traits["block_size"],
        )  # fmt: skip

    def __call__(
        self, x: Tensor, edge: Edge | None, weights: GqaWeights, eps: float, k_cache: Tensor, v_cache: Tensor,
        rows: CacheRows, scale: float, /,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        y, residual = self.enter(x, edge)
        fused = self.project(y, weights.qkv, weights.qkv_bias).view(x.shape[0], -1, self.head_dim)
        q, k, v = fused.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if weights.q_gain is not None:
            q = self.norm(q.flatten(0, 1), weights.q_gain, eps)[0].view(q.shape)
        if weights.k_gain is not None:
            k = self.norm(k.flatten(0, 1), weights.k_gain, eps)[0].view(k.shape)
        q, k = self.rotary(q, k, rows.positions, weights.cos_sin)
        self.store((k, v), (k_cache, v_cache), rows.kv_slots)
        out = self.attend(q, k_cache, v_cache, rows.block_table, rows.kv_len, rows.kv_lens, scale)
        return self.project_back(out.flatten(1), weights.out, weights.out_bias), residual


class MlaBlock(_Block):
    def __init__(self, choose: Choose, target: Target, traits: Traits) -> None:
        super().__init__(choose, target)
        self.linear = choose("linear", target)
        self.num_heads, self.nope_dim, self.rank, self.rope_dim, self.q_rank = (
            int(traits[name]) for name in ("num_heads", "nope_dim", "kv_lora_rank", "rope_dim", "q_lora_rank")
        )
        self.rotary = choose("rotary", target, head_dim=self.rope_dim, interleaved=traits["interleaved"])
        self.store = choose("kv_store", target)
        self.attend = choose(
            "mla_decode", target, num_heads=self.num_heads, kv_lora_rank=self.rank, rope_dim=self.rope_dim,
            block_size=traits["block_size"],
        )  # fmt: skip

    def __call__(
        self, x: Tensor, edge: Edge | None, weights: MlaWeights, eps: float, kv_cache: Tensor, rows: CacheRows,
        scale: float, /,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        y, residual = self.enter(x, edge)
        down = self.linear(y, weights.down, weights.down_bias)
        q_latent, latent, k_rope = down.split([self.q_rank, self.rank, self.rope_dim], dim=1)
        if weights.q_gain is not None:
            y = self.norm(q_latent, weights.q_gain, eps)[0]
        q = self.linear(y, weights.q_up, None).view(x.shape[0], self.num_heads, -1)
        q_nope, q_rope = q.tensor_split((self.nope_dim,), dim=-1)
        latent = self.norm(latent, weights.kv_gain, eps)[0]
        self.rotary(q_rope, k_rope.unsqueeze(1), rows.positions, weights.cos_sin)
        self.store((torch.cat((latent, k_rope), dim=1),), (kv_cache,), rows.kv_slots)
        absorbed = torch.bmm(q_nope.transpose(0, 1), weights.k_up).transpose(0, 1)
        sums = self.attend(
            absorbed.unsqueeze(1), q_rope.unsqueeze(1), kv_cache, rows.block_table, rows.kv_len, scale
        ).squeeze(1)
        values = torch.bmm(sums.transpose(0, 1), weights.v_up.transpose(1, 2)).transpose(0, 1)
        return self.linear(values.flatten(1), weights.out, weights.out_bias), residual


class MlpBlock(_Block):
    def __init__(self, choose: Choose, target: Target, traits: Traits) -> None:
        super().__init__(choose, target)
        self.expand, self.contract = (linear_of(choose, target, traits[name]) for name in ("gate_up_form", "down_form"))
        self.activate = choose("silu_mul", target)

    def __call__(self, x: Tensor, edge: Edge | None, weights: MlpWeights, /) -> tuple[Tensor, Tensor | None]:
        y, residual = self.enter(x, edge)
        inner = self.activate(self.expand(y, weights.gate_up, weights.gate_up_bias))
        return self.contract(inner, weights.down, weights.down_bias), residual


class MoeBlock(_Block):
    def __init__(self, choose: Choose, target: Target, traits: Traits) -> None:
        super().__init__(choose, target)
        # A rounding of the scores changes which expert answers.
        self.wide = torch.promote_types(target.dtype, torch.float32)
        self.score = choose("linear", dataclasses.replace(target, dtype=self.wide))
        names = ("num_experts", "top_k", "num_shared", "num_groups", "top_groups", "scoring", "normalise")
        self.route = choose("moe_route", target, **{name: traits[name] for name in names})
        self.experts = choose(
            "moe_experts", target, num_experts=int(traits["num_experts"]) + int(traits["num_shared"]),
            num_shared=traits["num_shared"], hidden_size=traits["hidden_size"],
            intermediate_size=traits["intermediate_size"],
        )  # fmt: skip

    def __call__(
        self, x: Tensor, edge: Edge | None, weights: MoeWeights, scale: float, num_tokens: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor | None]:
        y, residual = self.enter(x, edge)
        scores = self.score(y.to(self.wide), weights.router, None)
        ids, shares = self.route(scores, weights.bias, scale, num_tokens)
        return self.experts(y, weights.gate_up, weights.down, ids, shares), residual


class LmHead(_Block):
    def __init__(self, choose: Choose, target: Target, traits: Traits) -> None:
        super().__init__(choose, target)
        self.logits = choose("lm_head", target)
        self.sample = choose("sample", target)

    def __call__(
        self, x: Tensor, edge: Edge | None, weight: Tensor, slots: Tensor, state: SamplerState, /
    ) -> Tensor:
        y, _ = self.enter(x, edge)
        tokens: Tensor = self.sample(self.logits(y, weight), slots, state)
        return tokens


class Stack:
    """Each layer by two blocks of its own, as some kernels prepare for the weights that they have seen. They are chosen
    in the first call with these layers."""

    def __init__(self, choose: Choose, target: Target, traits: Traits) -> None:
        self.choose, self.target = choose, target
        self.hidden, self.inner = traits["hidden_size"], traits["intermediate_size"]
        self.heads = {name: each for name, each in traits.items() if name != "intermediate_size"}
        self.norm = choose("rms_norm", target)
        self.layers: tuple[DenseLayer, ...] | None = None
        self.blocks: list[tuple[Kernel, Kernel]] = []

    def __call__(
        self, x: Tensor, layers: tuple[DenseLayer, ...], caches: Sequence[tuple[Tensor, ...]], rows: CacheRows,
        gain: Tensor, eps: float, /,
    ) -> Tensor:  # fmt: skip
        if layers is not self.layers:
            self.layers, self.blocks = layers, [self.blocks_of(layer) for layer in layers]
        residual = None
        for layer, (attend, feed), (k, v) in zip(layers, self.blocks, caches, strict=True):
            edge = Edge(layer.attention_gain, layer.eps, residual)
            x, residual = attend(x, edge, layer.attention, layer.head_eps, k, v, rows, layer.scale)
            x, residual = feed(x, Edge(layer.mlp_gain, layer.eps, residual), layer.mlp)
        hidden: Tensor = self.norm(x, gain, eps, residual)[0]
        return hidden

    def blocks_of(self, layer: DenseLayer) -> tuple[Kernel, Kernel]:
        attention, mlp = layer.attention, layer.mlp
        return (
            self.choose(
                "gqa_block_decode", self.target, **self.heads,
                qkv_form=form_of(attention.qkv), out_form=form_of(attention.out),
            ),
            self.choose(
                "mlp_block_decode", self.target, hidden_size=self.hidden, intermediate_size=self.inner,
                gate_up_form=form_of(mlp.gate_up), down_form=form_of(mlp.down),
            ),
        )  # fmt: skip


BLOCKS: Mapping[str, Callable[[Choose, Target, Traits], Kernel]] = {
    "gqa_block_decode": GqaBlock,
    "lm_head_sample": LmHead,
    "mla_block_decode": MlaBlock,
    "mlp_block_decode": MlpBlock,
    "moe_block_decode": MoeBlock,
    "stack_decode": Stack,
}


def bind_block(op: str, choose: Choose) -> Callable[[Target, Traits], Kernel]:
    """The `bind` of a block whose ops `choose` answers."""
    return lambda target, traits: BLOCKS[op](choose, target, traits)
