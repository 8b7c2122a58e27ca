"""The ops that layers see. Each function here chooses once, while a model is built, and returns a callable
that costs nothing to dispatch.

Shapes: T tokens, R rows (requests), H hidden size, Hq query heads, Hk KV heads, D head dimension, P
positions. Activations are of `target.dtype` on the target's device. Tokens may lie apart (any stride in
the first dimension), so slices of a fused projection need no copy; the last dimension is contiguous.
The caches are [blocks, block_size, Hk, D], contiguous. Block tables and lengths are int32, token ids,
positions and slots int64. Results are new tensors unless an op says that it works in place.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from tokenspeed.kernels.registry import KernelError, Target
from tokenspeed.kernels.selection import select

__all__ = [
    "Embedding",
    "KVStore",
    "KernelError",
    "Linear",
    "MhaDecode",
    "MhaPrefill",
    "RmsNorm",
    "Rotary",
    "SiluMul",
    "Target",
    "embedding",
    "kv_store",
    "linear",
    "mha_decode",
    "mha_prefill",
    "rms_norm",
    "rotary",
    "silu_mul",
]


class Linear(Protocol):
    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> Tensor:
        """x [T,K], weight [N,K], bias [N] → x · weightᵀ + bias [T,N], summed in float32."""


class RmsNorm(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """x [T,H], weight [H], residual [T,H] or None → (y [T,H], r [T,H]).

        r = x + residual (x itself without a residual); y = r / sqrt(mean(r²) + eps) · weight, in float32
        from r as it is stored, rounded once (Zhang and Sennrich, 2019).
        """


class Rotary(Protocol):
    def __call__(self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor, /) -> tuple[Tensor, Tensor]:
        """q [T,Hq,D], k [T,Hk,D], positions [T], cos_sin [P,D] float32 → (q, k), rotated **in place**.

        `cos_sin[p]` holds D/2 cosines, then D/2 sines. Pair i is (x[i], x[i + D/2]), or
        (x[2i], x[2i + 1]) when interleaved; it becomes (a·cos − b·sin, b·cos + a·sin) (Su et al., 2021).
        Heads may lie apart as tokens may, so a slice of each head can be rotated.
        """


class SiluMul(Protocol):
    def __call__(self, gate_up: Tensor, /) -> Tensor:
        """gate_up [T,2I] → silu(gate) · up [T,I], gate the first half, in float32, rounded once."""


class KVStore(Protocol):
    def __call__(self, tensors: tuple[Tensor, ...], caches: tuple[Tensor, ...], kv_slots: Tensor, /) -> None:
        """Write token t of each tensor [T,...] to its cache [blocks, block_size, ...] at kv_slots[t].

        A slot is block × block_size + offset. The slots of one call are distinct.
        """


class MhaDecode(Protocol):
    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        kv_len: Tensor,
        kv_lens: tuple[int, ...],
        scale: float,
        /,
    ) -> Tensor:
        """One query token a row: q [R,Hq,D] → softmax(scale · q·Kᵀ)·V [R,Hq,D].

        Row r attends to its `kv_len[r]` ≥ 1 tokens; token j lies in block `block_table[r, j // block_size]`.
        block_table [R,M]: entries past a row's length are undefined. `kv_lens`: the host's upper bounds
        of kv_len (the same numbers on a CPU). Query head h reads KV head h // (Hq / Hk).
        """


class MhaPrefill(Protocol):
    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        kv_len: Tensor,
        query_lens: tuple[int, ...],
        kv_lens: tuple[int, ...],
        scale: float,
        /,
    ) -> Tensor:
        """Several query tokens a row, causal: q [T,Hq,D] → [T,Hq,D].

        Row r owns the next `query_lens[r]` ≥ 1 tokens of q. query_start [R+1] says the same on the device, up
        to a constant: only differences count, so a slice of a longer one will do. The KV of these tokens is
        already in the cache: token i of a row with n query tokens sees the first kv_len[r] − n + i + 1
        tokens. Else as `MhaDecode`.
        """


class Embedding(Protocol):
    def __call__(self, ids: Tensor, table: Tensor, /) -> Tensor:
        """ids [T], table [V,H] → table[ids] [T,H]."""


def linear(target: Target) -> Linear:
    """Matrix product with a weight stored as [out, in]."""
    return select("linear", target)


def rms_norm(target: Target) -> RmsNorm:
    """Root-mean-square norm, with the residual addition before it."""
    return select("rms_norm", target)


def rotary(target: Target, *, head_dim: int, interleaved: bool = False) -> Rotary:
    """Rotary position embedding of queries and keys; `head_dim` is the even number of elements rotated."""
    return select("rotary", target, head_dim=head_dim, interleaved=interleaved)


def silu_mul(target: Target) -> SiluMul:
    """The gated activation of a SwiGLU feed-forward."""
    return select("silu_mul", target)


def kv_store(target: Target) -> KVStore:
    """Write a step's KV into the paged cache."""
    return select("kv_store", target)


def mha_decode(target: Target, *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> MhaDecode:
    """Attention of one token a row over a paged cache (MHA, GQA and MQA)."""
    return select(
        "mha_decode",
        target,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
    )


def mha_prefill(target: Target, *, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> MhaPrefill:
    """Causal attention of several tokens a row over a paged cache (MHA, GQA and MQA)."""
    return select(
        "mha_prefill",
        target,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
    )


def embedding(target: Target) -> Embedding:
    """Rows of a table."""
    return select("embedding", target)
