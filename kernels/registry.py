"""Declarations: which backend implements which op, where, and for what."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tokenspeed.kernels.platform import Platform

TraitValue = int | bool | str
Traits = Mapping[str, TraitValue]
Kernel = Callable[..., Any]

_ATTENTION = ("num_heads", "num_kv_heads", "head_dim", "block_size")
_LATENT = ("num_heads", "kv_lora_rank", "rope_dim", "block_size")
_ROUTING = ("num_experts", "top_k", "num_shared", "num_groups", "top_groups", "scoring", "normalise")

OPS: Mapping[str, tuple[str, ...]] = {
    "all_reduce_norm": (),
    "decode_inputs": (),
    "embedding": (),
    "gqa_block_decode": (*_ATTENTION, "hidden_size", "interleaved", "qkv_form", "out_form"),
    "kv_store": (),
    "linear": (),
    "lm_head": (),
    "lm_head_sample": ("hidden_size", "vocab_size"),
    "mha_decode": _ATTENTION,
    "mha_prefill": _ATTENTION,
    "mla_block_decode": (*_LATENT, "hidden_size", "q_lora_rank", "nope_dim", "v_dim", "interleaved"),
    "mla_decode": _LATENT,
    "mla_prefill": (*_LATENT, "nope_dim", "v_dim"),
    "mlp_block_decode": ("hidden_size", "intermediate_size", "gate_up_form", "down_form"),
    "moe_block_decode": (*_ROUTING, "hidden_size", "intermediate_size"),
    "moe_experts": ("num_experts", "num_shared", "hidden_size", "intermediate_size"),
    "moe_route": _ROUTING,
    "packed_embedding": ("matrix_form",),
    "packed_linear": ("matrix_form",),
    "packed_lm_head": ("matrix_form",),
    "quantise": ("form", "block"),
    "rms_norm": (),
    "rotary": ("head_dim", "interleaved"),
    "sample": (),
    "silu_mul": (),
    "stack_decode": (*_ATTENTION, "hidden_size", "intermediate_size", "interleaved"),
}
"""Every op with the traits that its face passes to selection. A declaration may restrict no other trait."""

PARTS: Mapping[str, tuple[str, ...]] = {
    "gqa_block_decode": ("rms_norm", "linear", "packed_linear", "rotary", "kv_store", "mha_decode"),
    "lm_head_sample": ("rms_norm", "lm_head", "sample"),
    "mla_block_decode": ("rms_norm", "linear", "rotary", "kv_store", "mla_decode"),
    "mlp_block_decode": ("rms_norm", "linear", "packed_linear", "silu_mul"),
    "moe_block_decode": ("rms_norm", "linear", "moe_route", "moe_experts"),
    "stack_decode": ("gqa_block_decode", "mlp_block_decode", "rms_norm"),
}
"""The ops that a composite is made of."""


def parts_of(op: str) -> tuple[str, ...]:
    """The ops that a composite is made of, and what these are made of."""
    return tuple(dict.fromkeys(each for part in PARTS.get(op, ()) for each in (part, *parts_of(part))))


class KernelError(Exception):
    """The root of what this package raises on purpose."""


class DeclarationError(KernelError):
    """A declaration that cannot stand: unknown op or trait, or the key of another one."""


class SelectionError(KernelError):
    """No implementation may run here, or the one that was forced may not. The message says why."""


@dataclass(frozen=True)
class Target:
    """What a kernel is chosen for: the platform it runs on and the type of the activations."""

    platform: Platform
    dtype: torch.dtype


@dataclass(frozen=True)
class On:
    """Where an implementation runs. None is any; `isa` lists the features it cannot do without."""

    vendor: str | None = None
    arch: str | None = None
    isa: frozenset[str] = field(default_factory=frozenset)

    def rejects(self, platform: Platform) -> str | None:
        """Why not on this platform, or None."""
        if self.vendor is not None and self.vendor != platform.vendor:
            return f"runs on {self.vendor}, not on {platform.vendor}"
        if self.arch is not None and self.arch != platform.arch:
            return f"runs on {self.arch}, not on {platform.arch or 'this architecture'}"
        missing = sorted(self.isa - platform.isa)
        return f"needs {' '.join(missing)}" if missing else None

    def same_key(self, other: On) -> bool:
        """Whether one platform could fit both and neither asks for more features than the other."""
        return (
            (self.vendor is None or other.vendor is None or self.vendor == other.vendor)
            and (self.arch is None or other.arch is None or self.arch == other.arch)
            and self.isa == other.isa
        )

    def __str__(self) -> str:
        name = " ".join(part for part in (self.vendor, self.arch) if part) or "any"
        return f"{name}+{'+'.join(sorted(self.isa))}" if self.isa else name


@dataclass(frozen=True)
class OneOf:
    """A trait that takes one of these values."""

    values: frozenset[TraitValue]

    def allows(self, value: TraitValue) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return "in {" + ", ".join(str(value) for value in sorted(self.values, key=_by_value)) + "}"


@dataclass(frozen=True)
class Multiple:
    """An integer trait that is a multiple of `of`, and at most `at_most`."""

    of: int = 1
    at_most: int | None = None

    def allows(self, value: TraitValue) -> bool:
        return isinstance(value, int) and value % self.of == 0 and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        limit = "" if self.at_most is None else f", at most {self.at_most}"
        return f"a multiple of {self.of}{limit}"


def _by_value(value: TraitValue) -> tuple[bool, int, str]:
    """Numbers in order, then words."""
    return isinstance(value, str), 0 if isinstance(value, str) else value, str(value)


Condition = OneOf | Multiple


def _overlap(one: Condition, other: Condition) -> bool:
    """Whether some value satisfies both. Two `Multiple`s always share one (0)."""
    if isinstance(one, OneOf):
        return any(other.allows(value) for value in one.values)
    return _overlap(other, one) if isinstance(other, OneOf) else True


@dataclass(frozen=True)
class Implementation:
    """One declared implementation of one op.

    `bind(target, traits)` gives the callable that layers keep; it is called once per choice, when a
    model is built, and may import, compile or allocate. `variant` tells declarations of one backend
    apart (an instruction set, say). `selects_parts`: of a composite, that selection chooses its parts, so that a
    part that is forced is honoured. `unavailable()` gives the reason why this machine cannot bind it
    (a module that is not installed), or None. The highest `priority` that is legal is chosen; at equal
    priority the one declared first.
    """

    op: str
    backend: str
    bind: Callable[[Target, Traits], Kernel]
    platforms: tuple[On, ...] = (On(),)
    dtypes: frozenset[torch.dtype] | None = None
    traits: Mapping[str, Condition] = field(default_factory=dict)
    priority: int = 0
    variant: str = ""
    selects_parts: bool = False
    unavailable: Callable[[], str | None] = lambda: None

    @property
    def name(self) -> str:
        """What forcing and explaining call it: `backend` or `backend:variant`."""
        return f"{self.backend}:{self.variant}" if self.variant else self.backend

    def same_key(self, other: Implementation) -> bool:
        """Whether both answer some same request under the same name."""
        return (
            (self.op, self.name) == (other.op, other.name)
            and any(mine.same_key(theirs) for mine in self.platforms for theirs in other.platforms)
            and (self.dtypes is None or other.dtypes is None or not self.dtypes.isdisjoint(other.dtypes))
            and all(_overlap(self.traits[name], other.traits[name]) for name in self.traits if name in other.traits)
        )


def plain(function: Kernel) -> Callable[[Target, Traits], Kernel]:
    """The `bind` of an implementation that needs neither target nor traits."""
    return lambda target, traits: function


def lazy(path: str) -> Callable[[Target, Traits], Kernel]:
    """The `bind` that lives at "module:function", imported when it is first chosen."""

    def bind(target: Target, traits: Traits) -> Kernel:
        module, _, function = path.partition(":")
        kernel: Kernel = getattr(importlib.import_module(module), function)(target, traits)
        return kernel

    return bind


class Registry:
    """All declarations, by op, in the order in which they came."""

    def __init__(self) -> None:
        self._declared: dict[str, list[Implementation]] = {op: [] for op in OPS}

    def add(self, implementations: Iterable[Implementation]) -> int:
        """Add all of them and return how many, or raise `DeclarationError` and add none."""
        added: list[Implementation] = []
        for new in implementations:
            if new.op not in OPS:
                raise DeclarationError(f"{new.name} declares an unknown op {new.op!r}; ops are {', '.join(OPS)}")
            unknown = sorted(set(new.traits) - set(OPS[new.op]))
            if unknown:
                raise DeclarationError(f"{new.op}={new.name} restricts unknown traits: {', '.join(unknown)}")
            if any(new.same_key(old) for old in (*self._declared[new.op], *added)):
                raise DeclarationError(f"{new.op}={new.name} is declared twice for the same platform, dtype and traits")
            added.append(new)
        for new in added:
            self._declared[new.op].append(new)
        return len(added)

    def of(self, op: str) -> tuple[Implementation, ...]:
        """The implementations of an op, in order of declaration."""
        return tuple(self._declared[op])

    def all(self) -> tuple[Implementation, ...]:
        return tuple(implementation for declared in self._declared.values() for implementation in declared)
