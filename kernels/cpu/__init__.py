"""The CPU backend: C++ kernels, one build for each instruction set, the best legal one chosen by priority.

The variants `portable`, `avx2` and `avx512` are the same source at vectors of 4, 8 and 16 floats. `avx512_bf16`, for
bfloat16 alone, multiplies pairs of numbers in one instruction: packed weights (`pair_vectors.h`), which makes panels
the form of plain matrices there (`selection.plain_form`), rows, experts among them (`linear_few.h`, `linear_pairs.h`),
and attention (`attention_packed.h`, `mla_packed.h`). `amx` has packed weights and attention in tile instructions
(`pair_tiles.h`, `attention_tiles.h`). Sums and exponentials are in float32, and so are the weights of attention, except
where prompts or latents are multiplied in pairs.
Attention over the paged cache is online-softmax over tiles of 64 tokens (128 in a prefill and of latents in pairs); a
row's result depends neither on its batch, nor on the number of threads, nor on how a prompt was chunked. `linear` has
one order of sums up to 32 tokens and one above (`linear.py`), products with packed weights have one for all
(`panels.h`), quantised ones in pairs two (`pairs.h`). Blocks of a decode step are one call each, and so are all layers
of a dense decoder (`blocks.cc`). `embedding` of a plain table is torch's here.

Threads are a pool of this package's own (`parallel.h`), as many as `torch.set_num_threads` says.

Of experts there are `linear`'s two orders of sums (`moe_experts.py`); a chunk of latent attention is absorbed or
expanded by its length (`mla_prefill.py`), so there the bits do depend on how a prompt was chunked.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping

import torch

from tokenspeed.kernels.forms import FORMS, ROWS
from tokenspeed.kernels.registry import Condition, Implementation, Kernel, Multiple, On, OneOf, Target, Traits, lazy

_ANY_CPU = On("cpu")
_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
VARIANTS: Mapping[str, tuple[int, On]] = {
    "portable": (100, _ANY_CPU),
    "avx2": (110, On("cpu", "x86_64", _AVX2)),
    "avx512": (120, On("cpu", "x86_64", _AVX512)),
    "avx512_bf16": (130, On("cpu", "x86_64", _AVX512 | {"avx512_bf16"})),
    "amx": (140, On("cpu", "x86_64", _AVX512 | {"avx512_bf16", "amx_tile", "amx_bf16"})),
}
"""Variant → priority and where it runs."""

# A head is a whole number of vectors, of 16 floats unless a variant is named here.
_HEADS: Mapping[str, Condition] = {"head_dim": Multiple(16, at_most=256)}
_NARROW_HEADS: Mapping[str, Condition] = {"head_dim": Multiple(8, at_most=256)}
_NARROW = frozenset({"portable", "avx2"})
_NARROW_OPS = ("mha_decode", "mha_prefill")  # not the blocks: their products would be narrow too
_PACKED: Mapping[str, Condition] = {"matrix_form": OneOf(frozenset(FORMS) - {ROWS})}
_LATENT: Mapping[str, Condition] = {"kv_lora_rank": Multiple(16), "rope_dim": Multiple(16)}
# A token's choice is kept in registers and on the stack.
_ROUTE: Mapping[str, Condition] = {"top_k": Multiple(at_most=64), "num_groups": Multiple(at_most=64)}
TRAITS: Mapping[str, Mapping[str, Condition]] = {
    "gqa_block_decode": _HEADS,
    "linear": {},
    "lm_head": {},
    "mha_decode": _HEADS,
    "mha_prefill": _HEADS,
    "mla_decode": _LATENT,
    "mla_prefill": _LATENT,
    "mlp_block_decode": {},
    "moe_experts": {},
    "moe_route": _ROUTE,
    "packed_embedding": _PACKED,
    "packed_linear": _PACKED,
    "packed_lm_head": _PACKED,
    "rms_norm": {},
    "rotary": {},
    "sample": {},
    "silu_mul": {},
    "stack_decode": _HEADS,
}
"""Op with variants → its restrictions. The module of the same name has its launcher."""

DTYPES = frozenset({torch.float32, torch.bfloat16})
PAIRED = frozenset({"avx512_bf16", "amx"})
"""The variants that are for bfloat16 alone: float32 has the same instructions in `avx512`."""

PACKED_FIRST = 5
"""What a packed product in `avx512_bf16` ranks above the one with rows: 1.3 to 1.4 times as fast on a Zen 4, from one
token of 576 → 3,072 to thirty-two."""

TILED = (
    "gqa_block_decode", "mha_decode", "mha_prefill", "mla_decode", "mla_prefill", "mlp_block_decode", "packed_linear",
    "packed_lm_head", "stack_decode",
)  # fmt: skip
"""The ops that `amx` does better than `avx512_bf16`: where a matrix is packed, and attention."""


def implementations() -> tuple[Implementation, ...]:
    """Every op of `TRAITS` in every variant, and `kv_store`, which copies bytes the same way on all of them."""
    copying = lazy(f"{__name__}.kv_store:bind")
    kv_store = Implementation("kv_store", "cpu", copying, platforms=(_ANY_CPU,), priority=100, unavailable=_unavailable)
    return kv_store, *(
        Implementation(
            op,
            "cpu",
            _binder(op, variant),
            platforms=(on,),
            dtypes=frozenset({torch.bfloat16}) if variant in PAIRED else DTYPES,
            traits=_NARROW_HEADS if op in _NARROW_OPS and variant in _NARROW else traits,
            priority=priority + (PACKED_FIRST if (op, variant) == ("packed_linear", "avx512_bf16") else 0),
            variant=variant,
            unavailable={"amx": _no_tiles, "avx512_bf16": _slow_pairs}.get(variant, _unavailable),
        )
        for op, traits in TRAITS.items()
        for variant, (priority, on) in VARIANTS.items()
        if variant != "amx" or op in TILED
    )


def _unavailable() -> str | None:
    built = importlib.util.find_spec(f"{__name__}._ops") is not None
    return None if built else "the extension tokenspeed.kernels.cpu._ops is not built"


def _no_tiles() -> str | None:
    if (reason := _unavailable()) is not None:
        return reason
    allowed = importlib.import_module(f"{__name__}._ops").supports("amx")
    return None if allowed else "the system does not let this process use tiles"


def _slow_pairs() -> str | None:
    if (reason := _unavailable()) is not None:
        return reason
    known = importlib.import_module(f"{__name__}._ops")
    # Beside tiles, which take what is much, the vectors multiply a few tokens, and wait for the memory.
    worth = known.full_rate_pairs() or known.supports("amx") or not known.supports("avx512_bf16")
    return None if worth else "this processor multiplies pairs of bfloat16 at a fraction of float32's rate"


def _binder(op: str, variant: str) -> Callable[[Target, Traits], Kernel]:
    def bind(target: Target, traits: Traits) -> Kernel:
        kernels = importlib.import_module(f"{__name__}._ops").Kernels(variant, str(target.dtype).removeprefix("torch."))
        kernel: Kernel = importlib.import_module(f"{__name__}.{op}").bind(kernels, target, traits)
        return kernel

    return bind
