"""What each op is measured on: arguments of named sizes, and the bytes that it cannot help moving.

Sizes left out are those of Llama-3.1-8B (GQA, dense) and DeepSeek-V2-Lite (latent attention, experts). Values are
random, as the numerics suite draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenspeed.kernels.forms import FORMS, ROWS
from tokenspeed.kernels.numerics import attention_cases, block_cases, dense_cases, moe_cases, peer_cases, step_cases
from tokenspeed.kernels.numerics.case import Arguments
from tokenspeed.kernels.registry import OPS, KernelError, Traits, TraitValue

Sizes = Mapping[str, Any]
"""Values by name; as `Traits`, but read without asking for their type at every use."""

Make = Callable[[Sizes, torch.Generator, torch.dtype], Arguments]
Moved = Callable[[Sizes, Arguments, Any], float]
Flop = Callable[[Sizes, Arguments], float]


@dataclass(frozen=True)
class Workload:
    """`defaults` are all sizes of an op, its traits among them; `batch` names the one that counts a step's tokens or
    rows. `make` draws the arguments on the default device. `moved` gives the bytes to read and write, each once, of
    a call's arguments and result; `flop` the operations of its products, where these may be the limit."""

    batch: str
    defaults: Traits
    make: Make
    moved: Moved
    flop: Flop | None = None

    def sizes(self, given: Traits) -> dict[str, TraitValue]:
        """The defaults with what is given instead. Raises `KernelError` for a size that is none, or of another kind."""
        for name, value in given.items():
            if name not in self.defaults:
                raise KernelError(f"{name!r} is none of the sizes {', '.join(self.defaults)}")
            kind = type(self.defaults[name])
            if type(value) is not kind or (kind is int and int(value) < 0):
                raise KernelError(f"{name}={value} is not {_KINDS[kind]}")
            if name in _WORDS and value not in _WORDS[name]:
                raise KernelError(f"{name}={value} is not {' or '.join(_WORDS[name])}")
        return {**self.defaults, **given}

    def arguments(self, sizes: Traits, dtype: torch.dtype, device: torch.device) -> Arguments:
        """A call's arguments on `device`. Raises `KernelError` for sizes that no call can have."""
        try:
            with device:
                return self.make(sizes, torch.Generator(device).manual_seed(0), dtype)
        except (ArithmeticError, IndexError, ValueError, RuntimeError) as error:
            raise KernelError(f"no call has these sizes: {str(error).splitlines()[0]}") from error


_KINDS: Mapping[type, str] = {int: "a number", bool: "true or false", str: "a word"}
_MATRICES = ("matrix_form", "qkv_form", "out_form", "gate_up_form", "down_form", "layer_form")
_WORDS: Mapping[str, tuple[str, ...]] = {
    "form": ("fp8", "int8"), "scoring": ("softmax", "sigmoid"), **dict.fromkeys(_MATRICES, FORMS),
    "matrix_form": FORMS[1:],
}  # fmt: skip


def num_bytes(value: Any) -> int:
    """Bytes of all tensors in nested tuples."""
    if isinstance(value, tuple):
        return sum(map(num_bytes, value))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


def _all(sizes: Sizes, arguments: Arguments, value: Any) -> float:
    return num_bytes(arguments) + num_bytes(value)


def _gathered(sizes: Sizes, arguments: Arguments, value: Tensor) -> float:
    return num_bytes(arguments[0]) + 2 * num_bytes(value)


def _stored(sizes: Sizes, arguments: Arguments, value: None) -> float:
    return 2 * num_bytes(arguments[0]) + num_bytes(arguments[2])


def _attended(caches: slice, kv_len: int) -> Moved:
    """Of the caches only the rows' own tokens; everything else once."""

    def moved(sizes: Sizes, arguments: Arguments, value: Any) -> float:
        kept = arguments[caches]
        tokens = int(arguments[kv_len].sum())
        a_token = sum(num_bytes(cache[0, 0]) for cache in kept)
        return num_bytes(arguments) - num_bytes(kept) + num_bytes(value) + tokens * a_token

    return moved


def _block_attended(caches: slice, rows: int) -> Moved:
    """As `_attended`, of a whole block; its table of angles is not counted."""

    def moved(sizes: Sizes, arguments: Arguments, value: Any) -> float:
        kept, weights = arguments[caches], arguments[2]
        tokens = int(arguments[rows].kv_len.sum())
        a_token = sum(num_bytes(cache[0, 0]) for cache in kept)
        return num_bytes((*arguments[:2], *weights, value)) - num_bytes(weights.cos_sin) + tokens * a_token

    return moved


def _stack_attended(sizes: Sizes, arguments: Arguments, value: Tensor) -> float:
    x, layers, caches, rows = arguments[:4]
    a_token = sum(num_bytes(cache[0, 0]) for layer in caches for cache in layer)
    angles = sum(num_bytes(layer.attention.cos_sin) for layer in layers)
    return num_bytes((x, layers, value)) - angles + int(rows.kv_len.sum()) * a_token


def _chosen_experts(sizes: Sizes, arguments: Arguments, value: Tensor) -> float:
    x, gate_up, down, ids, weights = arguments
    distinct = int(ids[ids >= 0].unique().numel())
    return num_bytes((x, ids, weights, value)) + distinct * num_bytes((gate_up[0], down[0]))


def _routed_experts(sizes: Sizes, arguments: Arguments, value: Any) -> float:
    """With as many distinct experts as tokens that choose evenly are expected to meet."""
    x, edge, weights = arguments[:3]
    missed = (1 - sizes["top_k"] / sizes["num_experts"]) ** sizes["tokens"]
    met = sizes["num_experts"] * (1 - missed) + sizes["num_shared"]
    an_expert = num_bytes((weights.gate_up[0], weights.down[0]))
    return num_bytes((x, edge, weights.router, value)) + float(met) * an_expert


def _scored(sizes: Sizes, arguments: Arguments, value: Tensor) -> float:
    return num_bytes((*arguments[:3], value))


def _logits(sizes: Sizes, arguments: Arguments, value: Tensor) -> float:
    return num_bytes((arguments[0], value))


def _pairs(arguments: Arguments, query_lens: int) -> int:
    """(query, token that it sees) of a prefill's rows; the lengths of rows follow those of their chunks."""
    return sum(n * length - n * (n - 1) // 2 for n, length in zip(*arguments[query_lens : query_lens + 2], strict=True))


def _mha_flop(s: Sizes, arguments: Arguments) -> float:
    return float(4 * s["num_heads"] * s["head_dim"] * _pairs(arguments, 6))


def _mla_flop(s: Sizes, arguments: Arguments) -> float:
    """Of scores and sums over expanded keys and values; the expansion is not counted."""
    return float(2 * s["num_heads"] * (s["nope_dim"] + s["rope_dim"] + s["v_dim"]) * _pairs(arguments, 5))


def _experts_flop(s: Sizes, arguments: Arguments) -> float:
    return float(6 * s["hidden_size"] * s["intermediate_size"] * int((arguments[3] >= 0).sum()))


def _decoding(s: Sizes) -> tuple[int, ...]:
    return (int(s["context"]),) * int(s["rows"])


def _gqa(s: Sizes, new: int = 1) -> attention_cases.Paged:
    rows = ((new, s["context"]),) * s["rows"]
    return attention_cases.Paged(rows, s["num_heads"], s["num_kv_heads"], s["head_dim"], s["block_size"])


def _mla_decode(s: Sizes, g: torch.Generator, dtype: torch.dtype) -> Arguments:
    shape = s["num_heads"], s["queries"], s["block_size"], s["kv_lora_rank"], s["rope_dim"]
    return attention_cases.mla_decode_arguments(_decoding(s), *shape, g, dtype)


def _mla_prefill(s: Sizes, g: torch.Generator, dtype: torch.dtype) -> Arguments:
    traits = {name: s[name] for name in OPS["mla_prefill"]}
    return attention_cases.mla_prefill_arguments((s["new"],) * s["rows"], _decoding(s), traits, g, dtype)


def _moe_experts(s: Sizes, g: torch.Generator, dtype: torch.dtype) -> Arguments:
    hidden, inner, shared = s["hidden_size"], s["intermediate_size"], s["num_shared"]
    routed = s["num_experts"] - shared
    return moe_cases.moe_experts_arguments(s["tokens"], hidden, inner, routed, s["top_k"], shared, 0, g, dtype)


_GQA: Traits = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "block_size": 64}
_LATENT: Traits = {"num_heads": 16, "kv_lora_rank": 512, "rope_dim": 64, "block_size": 64}
_HEADS: Traits = {"nope_dim": 128, "v_dim": 128}
_ROUTING: Traits = {
    "num_experts": 64, "top_k": 6, "num_shared": 2, "num_groups": 1, "top_groups": 1, "scoring": "softmax",
    "normalise": False,
}  # fmt: skip
_EXPERT: Traits = {"hidden_size": 2048, "intermediate_size": 1408}
_ROWS: Traits = {"rows": 8, "context": 1024}
_CHUNK: Traits = {"new": 512, "rows": 1, "context": 8192}

WORKLOADS: Mapping[str, Workload] = {
    "all_reduce_norm": Workload(
        # In the memory of one device, where nobody is waited for: what is left is the kernel itself.
        "tokens", {"tokens": 8, "hidden_size": 4096, "ranks": 4},
        lambda s, g, t: peer_cases.all_reduce_norm_arguments(s["tokens"], s["hidden_size"], s["ranks"], 0, True, g, t),
        lambda s, a, y: float((s["ranks"] + 4) * a[0].numel() * a[0].element_size()),
    ),
    "decode_inputs": Workload(
        "rows", {"rows": 8, "width": 800},
        lambda s, g, t: step_cases.decode_inputs_arguments(s["rows"], s["width"], g, t), _all,
    ),
    "embedding": Workload(
        "tokens", {"tokens": 8, "vocab_size": 128_256, "hidden_size": 4096},
        lambda s, g, t: dense_cases.embedding_arguments(s["tokens"], s["vocab_size"], s["hidden_size"], g, t),
        _gathered,
    ),
    "gqa_block_decode": Workload(
        "rows", {**_ROWS, **_GQA, "hidden_size": 4096, "interleaved": False, "qkv_form": ROWS, "out_form": ROWS},
        lambda s, g, t: block_cases.gqa_block_arguments(_decoding(s), s, False, False, "residual", g, t),
        _block_attended(slice(4, 6), 6),
    ),
    "kv_store": Workload(
        "tokens", {"tokens": 8, "num_kv_heads": 8, "head_dim": 128, "block_size": 64},
        lambda s, g, t: attention_cases.kv_store_arguments(
            s["tokens"], s["num_kv_heads"], s["head_dim"], s["block_size"], g, t
        ),
        _stored,
    ),
    "linear": Workload(
        "tokens", {"tokens": 8, "in": 4096, "out": 4096},
        lambda s, g, t: dense_cases.linear_arguments(s["tokens"], s["in"], s["out"], False, 0, g, t), _all,
        lambda s, a: 2.0 * s["tokens"] * s["in"] * s["out"],
    ),
    "lm_head": Workload(
        "rows", {"rows": 8, "hidden_size": 4096, "vocab_size": 128_256},
        lambda s, g, t: dense_cases.lm_head_arguments(s["rows"], s["hidden_size"], s["vocab_size"], g, t), _all,
    ),
    "lm_head_sample": Workload(
        "rows", {"rows": 8, "hidden_size": 4096, "vocab_size": 128_256},
        lambda s, g, t: block_cases.lm_head_arguments(s["rows"], s["hidden_size"], s["vocab_size"], "residual", g, t),
        _scored,
    ),
    "mha_decode": Workload(
        "rows", {**_ROWS, **_GQA}, lambda s, g, t: _gqa(s).decode_arguments(g, t), _attended(slice(1, 3), 4)
    ),
    "mha_prefill": Workload(
        "new", {**_CHUNK, **_GQA}, lambda s, g, t: _gqa(s, s["new"]).arguments(g, t), _attended(slice(1, 3), 5),
        _mha_flop,
    ),
    "mla_block_decode": Workload(
        "rows", {**_ROWS, **_LATENT, **_HEADS, "hidden_size": 2048, "q_lora_rank": 0, "interleaved": True},
        lambda s, g, t: block_cases.mla_block_arguments(_decoding(s), s, "residual", g, t),
        _block_attended(slice(4, 5), 5),
    ),
    "mla_decode": Workload("rows", {**_ROWS, "queries": 1, **_LATENT}, _mla_decode, _attended(slice(2, 3), 4)),
    "mla_prefill": Workload("new", {**_CHUNK, **_LATENT, **_HEADS}, _mla_prefill, _attended(slice(1, 2), 4), _mla_flop),
    "mlp_block_decode": Workload(
        "tokens",
        {"tokens": 8, "hidden_size": 4096, "intermediate_size": 14_336, "gate_up_form": ROWS, "down_form": ROWS},
        lambda s, g, t: block_cases.mlp_block_arguments(s["tokens"], s, False, "residual", g, t), _all,
    ),
    "moe_block_decode": Workload(
        "tokens", {"tokens": 8, **_ROUTING, **_EXPERT},
        lambda s, g, t: block_cases.moe_block_arguments(s["tokens"], None, s, "residual", g, t), _routed_experts,
    ),
    "moe_experts": Workload(
        "tokens", {"tokens": 8, "top_k": 6, "num_experts": 66, "num_shared": 2, **_EXPERT}, _moe_experts,
        _chosen_experts, _experts_flop,
    ),
    "moe_route": Workload(
        "tokens", {"tokens": 8, **_ROUTING},
        lambda s, g, t: moe_cases.moe_route_arguments(
            s["tokens"], s["num_experts"], s["scoring"] == "sigmoid", 0, g, t
        ),
        _all,
    ),
    "packed_embedding": Workload(
        "tokens", {"tokens": 8, "vocab_size": 128_256, "hidden_size": 4096, "matrix_form": "q8_0"},
        lambda s, g, t: dense_cases.packed_embedding_arguments(
            s["matrix_form"], s["tokens"], s["vocab_size"], s["hidden_size"], g, t
        ),
        _gathered,
    ),
    "packed_linear": Workload(
        "tokens", {"tokens": 8, "in": 4096, "out": 4096, "matrix_form": "q4_1"},
        lambda s, g, t: dense_cases.packed_linear_arguments(
            s["matrix_form"], s["tokens"], s["in"], s["out"], False, g, t
        ),
        _all,
    ),
    "packed_lm_head": Workload(
        "rows", {"rows": 8, "hidden_size": 4096, "vocab_size": 128_256, "matrix_form": "q8_0"},
        lambda s, g, t: dense_cases.packed_lm_head_arguments(
            s["matrix_form"], s["rows"], s["hidden_size"], s["vocab_size"], g, t
        ),
        _all,
    ),
    "quantise": Workload(
        "tokens", {"tokens": 8, "hidden_size": 4096, "form": "fp8", "block": 128},
        lambda s, g, t: dense_cases.quantise_arguments(s["tokens"], s["hidden_size"], g, t), _all,
    ),
    "rms_norm": Workload(
        "tokens", {"tokens": 8, "hidden_size": 4096},
        lambda s, g, t: dense_cases.rms_norm_arguments(s["tokens"], s["hidden_size"], True, 0, g, t), _all,
    ),
    "rotary": Workload(
        "tokens", {"tokens": 8, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "interleaved": False},
        lambda s, g, t: dense_cases.rotary_arguments(
            s["tokens"], s["num_heads"], s["num_kv_heads"], s["head_dim"], g, t
        ),
        _all,
    ),
    "sample": Workload(
        "rows", {"rows": 8, "vocab_size": 128_256},
        lambda s, g, t: step_cases.sample_arguments(s["rows"], s["vocab_size"], g, t), _logits,
    ),
    "silu_mul": Workload(
        "tokens", {"tokens": 8, "intermediate_size": 14_336},
        lambda s, g, t: dense_cases.silu_mul_arguments(s["tokens"], s["intermediate_size"], 1.0, g, t), _all,
    ),
    "stack_decode": Workload(
        "rows",
        {**_ROWS, **_GQA, "hidden_size": 4096, "intermediate_size": 14_336, "interleaved": False, "layers": 2,
         "layer_form": ROWS},
        lambda s, g, t: block_cases.stack_arguments(
            _decoding(s), (s["layer_form"],) * s["layers"], s, False, False, g, t
        ),
        _stack_attended,
    ),
}  # fmt: skip


def workload_of(op: str) -> Workload:
    """The workload of an op, or `KernelError` for an op that is none."""
    if op not in WORKLOADS:
        raise KernelError(f"unknown op {op!r}; ops are {', '.join(OPS)}")
    return WORKLOADS[op]


def traits_of(op: str, sizes: Traits) -> dict[str, TraitValue]:
    """The traits among the sizes."""
    return {name: sizes[name] for name in OPS[op]}
