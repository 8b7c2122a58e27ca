"""Inputs of the ops of whole blocks: a decode step's rows at the end of ragged caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

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
from tokenspeed.kernels.forms import ROWS, Matrix, pack
from tokenspeed.kernels.numerics.attention_cases import paged_cache
from tokenspeed.kernels.numerics.case import Arguments, Case, Results, normal, weight
from tokenspeed.kernels.numerics.dense_cases import angles, packed_weight
from tokenspeed.kernels.numerics.step_cases import sampler_state
from tokenspeed.kernels.registry import TraitValue
from tokenspeed.kernels.sampler_state import EDITS, RANDOM

EPS = 1e-5
Sizes = Mapping[str, Any]


def _gain(g: torch.Generator, dtype: torch.dtype, size: int) -> Tensor:
    return (1 + 0.1 * torch.randn(size, generator=g)).to(dtype)


def _edge(g: torch.Generator, dtype: torch.dtype, kind: str, tokens: int, hidden: int) -> Edge | None:
    """`kind` is "normed" (no edge), "first" (no residual yet) or "residual"."""
    if kind == "normed":
        return None
    return Edge(_gain(g, dtype, hidden), EPS, normal(g, dtype, tokens, hidden) if kind == "residual" else None)


def _rows(table: Tensor, lengths: tuple[int, ...], block_size: int) -> CacheRows:
    kv_len = torch.tensor(lengths, dtype=torch.int32)
    positions = (kv_len.long() - 1).clamp_min(0)
    blocks = table.gather(1, (positions // block_size)[:, None])[:, 0]
    slots = blocks.long() * block_size + positions % block_size
    return CacheRows(positions, torch.where(kv_len > 0, slots, -1), kv_len, table, lengths)


def _stored(cache: Tensor, rows: CacheRows) -> Tensor:
    """What the rows' slots hold; the rest of the cache is not finite."""
    return cache.flatten(0, 1)[rows.kv_slots[rows.kv_slots >= 0]]


def gqa_block_cases() -> Iterator[Case]:
    for lengths, hidden, heads, kv_heads, head_dim, block_size, qk_norm, bias, edge, forms in (
        ((1,), 64, 4, 2, 16, 16, False, True, "residual", (ROWS, ROWS)),
        ((70, 1, 33), 96, 6, 2, 32, 16, True, False, "normed", (ROWS, ROWS)),
        ((130, 64, 65, 2, 17), 128, 8, 1, 64, 64, False, False, "first", (ROWS, ROWS)),
        ((300, 1), 64, 4, 2, 16, 16, False, True, "residual", ("q4_1", "q8_0")),
        ((70, 0, 33, 600, 5, 1), 96, 6, 2, 32, 16, True, False, "normed", ("panels", "q4_0")),
        ((9,), 128, 8, 1, 64, 64, False, True, "first", ("q8_0", "panels")),
    ):
        traits: dict[str, TraitValue] = {
            "hidden_size": hidden, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim,
            "block_size": block_size, "interleaved": False, "qkv_form": forms[0], "out_form": forms[1],
        }  # fmt: skip
        name = f"{len(lengths)} rows to {max(lengths)}, {heads}/{kv_heads}x{head_dim}, {edge}, {forms[0]}, {forms[1]}"
        yield Case(name, traits, partial(gqa_block_arguments, lengths, traits, qk_norm, bias, edge), _gqa_results)


def _matrix(form: Any, g: torch.Generator, dtype: torch.dtype, rows: int, columns: int) -> Matrix:
    """A projection that keeps the size of what it multiplies."""
    if form == ROWS:
        return weight(g, dtype, rows, columns)
    if form == "panels":
        return pack(weight(g, dtype, rows, columns))
    return packed_weight(form, rows, columns, g, dtype, columns**-0.5)


def gqa_block_arguments(
    lengths: tuple[int, ...], sizes: Sizes, qk_norm: bool, bias: bool, edge: str, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    hidden, heads, kv_heads, head_dim = (
        sizes[name] for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim")
    )
    cache, table = paged_cache(g, dtype, lengths, sizes["block_size"], kv_heads, 2 * head_dim)
    width = (heads + 2 * kv_heads) * head_dim
    weights = GqaWeights(
        qkv=_matrix(sizes["qkv_form"], g, dtype, width, hidden),
        qkv_bias=normal(g, dtype, width) if bias else None,
        q_gain=_gain(g, dtype, head_dim) if qk_norm else None,
        k_gain=_gain(g, dtype, head_dim) if qk_norm else None,
        cos_sin=angles(g, max(lengths), head_dim),
        out=_matrix(sizes["out_form"], g, dtype, hidden, heads * head_dim),
        out_bias=normal(g, dtype, hidden) if bias else None,
    )
    k, v = (half.contiguous() for half in cache.tensor_split(2, dim=-1))
    x, entered = normal(g, dtype, len(lengths), hidden), _edge(g, dtype, edge, len(lengths), hidden)
    return x, entered, weights, EPS, k, v, _rows(table, lengths, sizes["block_size"]), head_dim**-0.5


def _contribution(value: tuple[Tensor, Tensor | None]) -> Results:
    y, residual = value
    return (y,) if residual is None else (y, residual)


def _gqa_results(arguments: Arguments, value: tuple[Tensor, Tensor | None]) -> Results:
    _, _, _, _, k, v, rows, _ = arguments
    return *_contribution(value), _stored(k, rows), _stored(v, rows)


def mlp_block_cases() -> Iterator[Case]:
    for tokens, hidden, inner, bias, edge, forms in (
        (1, 64, 96, True, "residual", (ROWS, ROWS)),
        (5, 96, 64, False, "normed", (ROWS, ROWS)),
        (1, 96, 160, False, "residual", ("q4_1", "q4_1")),
        (4, 64, 64, True, "first", ("q4_k", "q8_0")),
        (9, 128, 96, False, "residual", ("panels", "q4_0")),
    ):
        traits: dict[str, TraitValue] = {
            "hidden_size": hidden, "intermediate_size": inner, "gate_up_form": forms[0], "down_form": forms[1],
        }  # fmt: skip
        name = f"{tokens}x{hidden}, {inner} wide, {edge}, {forms[0]}, {forms[1]}"
        yield Case(name, traits, partial(mlp_block_arguments, tokens, traits, bias, edge), _mlp_results)


def mlp_block_arguments(
    tokens: int, sizes: Sizes, bias: bool, edge: str, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    weights = MlpWeights(
        gate_up=_matrix(sizes["gate_up_form"], g, dtype, 2 * inner, hidden),
        gate_up_bias=normal(g, dtype, 2 * inner) if bias else None,
        down=_matrix(sizes["down_form"], g, dtype, hidden, inner),
        down_bias=normal(g, dtype, hidden) if bias else None,
    )
    return normal(g, dtype, tokens, hidden), _edge(g, dtype, edge, tokens, hidden), weights


def _mlp_results(arguments: Arguments, value: tuple[Tensor, Tensor | None]) -> Results:
    return _contribution(value)


def stack_cases() -> Iterator[Case]:
    for lengths, layers, hidden, inner, heads, kv_heads, head_dim, block_size, qk_norm, bias, forms in (
        ((1,), 1, 64, 96, 4, 2, 16, 16, False, True, (ROWS,)),
        ((70, 1, 33), 2, 96, 64, 6, 2, 32, 16, True, False, (ROWS,)),
        ((9,), 2, 128, 160, 8, 1, 64, 64, False, True, ("q4_1", ROWS)),
        ((130, 0, 65, 300, 2, 17), 2, 96, 160, 6, 3, 32, 16, True, True, ("q8_0", "panels")),
    ):
        traits: dict[str, TraitValue] = {
            "hidden_size": hidden, "intermediate_size": inner, "num_heads": heads, "num_kv_heads": kv_heads,
            "head_dim": head_dim, "block_size": block_size, "interleaved": False,
        }  # fmt: skip
        name = f"{layers} layers, {len(lengths)} rows to {max(lengths)}, {heads}/{kv_heads}x{head_dim}, {forms[0]}"
        of = forms[:1] * layers if len(forms) == 1 else forms
        yield Case(name, traits, partial(stack_arguments, lengths, of, traits, qk_norm, bias), _stack_results)


def stack_arguments(
    lengths: tuple[int, ...], forms: tuple[str, ...], sizes: Sizes, qk_norm: bool, bias: bool, g: torch.Generator,
    dtype: torch.dtype,
) -> Arguments:  # fmt: skip
    """A layer of each of these forms."""
    layers: list[DenseLayer] = []
    caches: list[tuple[Tensor, Tensor]] = []
    first: Arguments | None = None
    for form in forms:
        attention_sizes = {**sizes, "qkv_form": form, "out_form": form}
        attention = gqa_block_arguments(lengths, attention_sizes, qk_norm, bias, "first", g, dtype)
        mlp_sizes = {**sizes, "gate_up_form": form, "down_form": form}
        mlp = mlp_block_arguments(len(lengths), mlp_sizes, bias, "first", g, dtype)
        _, edge, weights, eps, k, v, _, scale = attention
        if first is None:
            first = attention
        else:  # over the blocks of the first layer's rows
            k, v = (torch.where(cache.isfinite(), normal(g, dtype, *cache.shape), cache) for cache in caches[0])
            weights = weights._replace(cos_sin=layers[0].attention.cos_sin)
        layers.append(DenseLayer(edge.gain, weights, eps, scale, mlp[1].gain, mlp[2], EPS))
        caches.append((k, v))
    assert first is not None
    return first[0], tuple(layers), tuple(caches), first[6], _gain(g, dtype, sizes["hidden_size"]), EPS


def _stack_results(arguments: Arguments, value: Tensor) -> Results:
    _, _, caches, rows, *_ = arguments
    return value, *(_stored(cache, rows) for layer in caches for cache in layer)


def mla_block_cases() -> Iterator[Case]:
    for lengths, hidden, heads, q_rank, rank, nope, rope, value, block_size, interleaved, edge in (
        ((1,), 64, 4, 0, 32, 16, 16, 16, 16, True, "residual"),
        ((70, 1, 33), 96, 3, 48, 64, 24, 16, 20, 16, False, "normed"),
        ((130, 64, 65, 2), 128, 5, 0, 128, 32, 32, 32, 64, True, "first"),
        ((40,), 96, 2, 32, 32, 32, 16, 16, 16, False, "first"),
        ((3, 1, 20, 33, 7, 16, 0, 64, 2, 5), 64, 3, 32, 32, 16, 16, 32, 16, True, "residual"),
        ((70, 3), 64, 2, 0, 128, 32, 32, 128, 16, True, "normed"),
        ((1000,), 256, 16, 0, 512, 128, 64, 128, 64, True, "residual"),
        ((700, 0, 64, 65, 1, 1500, 128, 3), 256, 16, 0, 512, 128, 64, 128, 64, True, "residual"),
        ((9, 300) * 9, 256, 16, 96, 512, 128, 64, 128, 64, False, "first"),
    ):
        traits: dict[str, TraitValue] = {
            "hidden_size": hidden, "num_heads": heads, "q_lora_rank": q_rank, "kv_lora_rank": rank, "nope_dim": nope,
            "rope_dim": rope, "v_dim": value, "block_size": block_size, "interleaved": interleaved,
        }  # fmt: skip
        name = f"{len(lengths)} rows to {max(lengths)}, {heads} heads, {q_rank}, {rank}+{rope}, {edge}"
        yield Case(name, traits, partial(mla_block_arguments, lengths, traits, edge), _mla_results)


def mla_block_arguments(
    lengths: tuple[int, ...], sizes: Sizes, edge: str, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    names = ("hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank", "nope_dim", "rope_dim", "v_dim", "block_size")
    hidden, heads, q_rank, rank, nope, rope, value, block_size = (sizes[name] for name in names)
    cache, table = paged_cache(g, dtype, lengths, block_size, rank + rope)
    k_up, v_up = weight(g, dtype, heads, nope + value, rank).tensor_split((nope,), dim=1)
    weights = MlaWeights(
        down=weight(g, dtype, q_rank + rank + rope, hidden),
        down_bias=normal(g, dtype, q_rank + rank + rope) if edge == "first" else None,
        q_gain=_gain(g, dtype, q_rank) if q_rank else None,
        kv_gain=_gain(g, dtype, rank),
        q_up=weight(g, dtype, heads * (nope + rope), q_rank or hidden),
        k_up=k_up,
        v_up=v_up,
        cos_sin=angles(g, max(lengths), rope),
        out=weight(g, dtype, hidden, heads * value),
        out_bias=normal(g, dtype, hidden),
    )
    x, entered = normal(g, dtype, len(lengths), hidden), _edge(g, dtype, edge, len(lengths), hidden)
    return x, entered, weights, EPS, cache, _rows(table, lengths, block_size), (nope + rope) ** -0.5


def _mla_results(arguments: Arguments, value: tuple[Tensor, Tensor | None]) -> Results:
    _, _, _, _, cache, rows, _ = arguments
    return *_contribution(value), _stored(cache, rows)


def moe_block_cases() -> Iterator[Case]:
    for tokens, hidden, inner, experts, top_k, shared, groups, top_groups, scoring, edge in (
        (1, 64, 64, 8, 2, 1, 1, 1, "softmax", "residual"),
        (1, 64, 64, 6, 3, 0, 1, 1, "sigmoid", "normed"),
        (1, 256, 384, 64, 6, 2, 1, 1, "softmax", "residual"),
        (1, 512, 128, 20, 4, 1, 1, 1, "sigmoid", "normed"),
        (1, 64, 96, 3, 2, 1, 1, 1, "softmax", "normed"),  # a width that 64 does not divide
        (1, 1024, 256, 40, 5, 0, 1, 1, "sigmoid", "first"),
        (8, 256, 192, 64, 6, 2, 1, 1, "softmax", "residual"),
        (5, 128, 64, 12, 3, 0, 4, 2, "sigmoid", "normed"),
        (19, 64, 128, 16, 4, 2, 1, 1, "softmax", "first"),
    ):
        traits: dict[str, TraitValue] = {
            "hidden_size": hidden, "intermediate_size": inner, "num_experts": experts, "top_k": top_k,
            "num_shared": shared, "num_groups": groups, "top_groups": top_groups, "scoring": scoring,
            "normalise": scoring == "sigmoid",
        }  # fmt: skip
        for padding in (None, (tokens + 1) // 2):
            name = f"{tokens} tokens, {padding or 0} padding, {experts}+{shared} experts, {scoring}, {edge}"
            yield Case(name, traits, partial(moe_block_arguments, tokens, padding, traits, edge), _moe_results)


def moe_block_arguments(
    tokens: int, padding: int | None, sizes: Sizes, edge: str, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    hidden, inner, experts, shared = (
        sizes[name] for name in ("hidden_size", "intermediate_size", "num_experts", "num_shared")
    )
    # Scores one or more apart, each expert at home in one direction: no rounding of x changes a choice.
    router = torch.zeros(experts, hidden)
    router[:, :experts] = torch.eye(experts)
    x = normal(g, dtype, tokens, hidden)
    x[:, :experts] = torch.stack([torch.randperm(experts, generator=g) for _ in range(tokens)]).to(dtype) / 2
    weights = MoeWeights(
        router=router,
        bias=torch.randn(experts, generator=g) * 0.001 if sizes["scoring"] == "sigmoid" else None,
        gate_up=weight(g, dtype, experts + shared, 2 * inner, hidden),
        down=weight(g, dtype, experts + shared, hidden, inner),
    )
    entered = _edge(g, dtype, edge, tokens, hidden)
    if entered is not None:
        # What the norm sees keeps the order: gains of 1, nothing added where the router looks.
        entered.gain[:experts] = 1
        if entered.residual is not None:
            entered.residual[:, :experts] = 0
    return x, entered, weights, 2.5, None if padding is None else torch.tensor([tokens - padding], dtype=torch.int32)


def _moe_results(arguments: Arguments, value: tuple[Tensor, Tensor | None]) -> Results:
    return _contribution(value)


def lm_head_cases() -> Iterator[Case]:
    for rows, hidden, vocab, edge in ((1, 64, 300, "residual"), (5, 96, 517, "normed"), (9, 64, 300, "first")):
        traits: dict[str, TraitValue] = {"hidden_size": hidden, "vocab_size": vocab}
        made = partial(lm_head_arguments, rows, hidden, vocab, edge)
        yield Case(f"{rows}x{hidden} → {vocab}, {edge}", traits, made, _tokens)


def lm_head_arguments(
    rows: int, hidden: int, vocab: int, edge: str, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    # Each row is at home with one token: its logit stands far above the others, whatever is drawn or rounded.
    table = weight(g, dtype, vocab, hidden)
    x = (table[torch.randperm(vocab, generator=g)[:rows]].float() * 40).to(dtype)
    entered = _edge(g, dtype, edge, rows, hidden)
    if entered is not None and entered.residual is not None:
        entered.residual.mul_(0.01)
    state = sampler_state(g, rows + 3, vocab)
    state.features.copy_(torch.tensor([(0, RANDOM, EDITS)[slot % 3] for slot in range(rows + 3)]))
    for cut, neutral in ((state.top_k, 0), (state.top_p, 1), (state.min_p, 0)):
        cut.fill_(neutral)
    state.bias.clamp_(-1, 1)
    state.temperature.fill_(0.1)
    slots = torch.randperm(rows + 2, generator=g)[:rows].int()
    if rows > 1:
        slots[1] = -1  # padding
    return x, entered, table, slots, state


def _tokens(arguments: Arguments, value: Tensor) -> Results:
    """The tokens in two digits of 16: numbers that every type holds."""
    x, _, _, _, state = arguments
    tokens = torch.cat((value.long(), state.last_token[:-1])) + 1
    return (torch.stack((tokens // 16, tokens % 16, torch.ones_like(tokens)), dim=1).to(x.dtype),)
