"""The ops that layers see. Each function here chooses once, while a model is built, and returns a callable
that costs nothing to dispatch.

Shapes: T tokens, R rows (requests), H hidden size, Hq query heads, Hk KV heads, D head dimension, P
positions. Activations are of `target.dtype` on the target's device. Tokens may lie apart (any stride in
the first dimension), so slices of a fused projection need no copy; the last dimension is contiguous.
The caches are [blocks, block_size, Hk, D], contiguous. Block tables and lengths are int32, token ids,
positions and slots int64. Results are new tensors unless an op says that it works in place.
"""

from __future__ import annotations

from typing import Literal, Protocol

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
    "MlaDecode",
    "MlaPrefill",
    "MoeExperts",
    "MoeRoute",
    "RmsNorm",
    "Rotary",
    "SiluMul",
    "Target",
    "embedding",
    "kv_store",
    "linear",
    "mha_decode",
    "mha_prefill",
    "mla_decode",
    "mla_prefill",
    "moe_experts",
    "moe_route",
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

        Row r attends to its `kv_len[r]` tokens; token j lies in block `block_table[r, j // block_size]`.
        block_table [R,M]: entries past a row's length are undefined. `kv_lens`: the host's upper bounds
        of kv_len (the same numbers on a CPU). Query head h reads KV head h // (Hq / Hk). A row of length 0,
        the padding of a captured step, gives zeros; the CPU's steps have none.
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


class MlaDecode(Protocol):
    def __call__(
        self, q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float, /
    ) -> Tensor:
        """A few query tokens a row, multi-head latent attention in the latent space (DeepSeek-AI, 2024).

        q_latent [R,Q,Hq,C], the query after the key projection was absorbed into it, and q_rope
        [R,Q,Hq,P] (any strides but the last) → [R,Q,Hq,C], still to be multiplied by the value
        projection. kv_cache [blocks, block_size, C+P]: the normed latent, then the rotated key part; score
        = scale · (q_latent · latent + q_rope · rope), value = latent.

        Row r attends to its `kv_len[r]` tokens, of which the last Q are the query tokens themselves: query i
        sees the first kv_len[r] − Q + 1 + i. One that sees none gives zeros: a padding row has length 0.
        kv_len [R] is read on the device only; block table entries past a row's length are undefined, and
        nothing behind a row's last token is read.
        """


class MlaPrefill(Protocol):
    def __call__(
        self,
        q: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        query_start: Tensor,
        kv_len: Tensor,
        query_lens: tuple[int, ...],
        kv_lens: tuple[int, ...],
        k_up: Tensor,
        v_up: Tensor,
        scale: float,
        /,
    ) -> Tensor:
        """Several query tokens a row, causal, over keys and values expanded from the latent cache.

        q [T,Hq,N+P] (not absorbed: N without position, P rotated), k_up [Hq,N,C], v_up [Hq,V,C] → [T,Hq,V].
        Head h of token j has the key (k_up[h] · latent[j], rope[j]) and the value v_up[h] · latent[j]. Rows,
        lengths and query_start as in `MhaPrefill`, cache as in `MlaDecode`.
        """


class MoeRoute(Protocol):
    def __call__(
        self, logits: Tensor, bias: Tensor | None, scale: float, num_tokens: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """logits [T,E], bias [E] float32 or None → (ids [T,K+S] int32, weights [T,K+S] float32).

        Scores are softmax(logits) or sigmoid(logits). With fewer `top_groups` than `num_groups`, only
        experts of the best groups of E / num_groups neighbours stay; a group counts by its largest score
        (softmax) or the sum of its two largest (sigmoid). Then the `top_k` largest, largest first, of equals
        the lower id. `bias` is added for the choice alone. Weights are the scores of the chosen, divided by
        their sum (+1e-20) if `normalise`, times `scale` (DeepSeek-V2, 2024; DeepSeek-V3, 2024).

        The S = `num_shared` experts E … E+S−1 follow with weight 1. Tokens from `num_tokens` on (int32 [1]
        on the device) are padding: id −1, weight 0.
        """


class MoeExperts(Protocol):
    def __call__(self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, /) -> Tensor:
        """x [T,H], gate_up [E,2I,H] (gate first), down [E,H,I], ids and weights [T,K] → [T,H].

        y = Σ over slots of weight · down[e] · (silu(gate[e] · x) · (up[e] · x)), summed in float32. A token
        names an expert once; id −1 is an empty slot. The last `num_shared` slots of every token hold the
        last `num_shared` experts in order (or −1 in a padding token), as `MoeRoute` gives them.
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


def mla_decode(target: Target, *, num_heads: int, kv_lora_rank: int, rope_dim: int, block_size: int) -> MlaDecode:
    """Latent attention of up to a few tokens a row, absorbed."""
    return select(
        "mla_decode",
        target,
        num_heads=num_heads,
        kv_lora_rank=kv_lora_rank,
        rope_dim=rope_dim,
        block_size=block_size,
    )


def mla_prefill(
    target: Target, *, num_heads: int, nope_dim: int, v_dim: int, kv_lora_rank: int, rope_dim: int, block_size: int
) -> MlaPrefill:
    """Latent attention of several tokens a row, expanded."""
    return select(
        "mla_prefill",
        target,
        num_heads=num_heads,
        nope_dim=nope_dim,
        v_dim=v_dim,
        kv_lora_rank=kv_lora_rank,
        rope_dim=rope_dim,
        block_size=block_size,
    )


def moe_route(
    target: Target,
    *,
    num_experts: int,
    top_k: int,
    num_shared: int = 0,
    num_groups: int = 1,
    top_groups: int = 1,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    normalise: bool = False,
) -> MoeRoute:
    """Which experts a token goes to; `num_experts` counts the routed ones, `num_shared` are added to every token."""
    return select(
        "moe_route",
        target,
        num_experts=num_experts,
        top_k=top_k,
        num_shared=num_shared,
        num_groups=num_groups,
        top_groups=top_groups,
        scoring=scoring,
        normalise=normalise,
    )


def moe_experts(
    target: Target, *, num_experts: int, num_shared: int = 0, hidden_size: int, intermediate_size: int
) -> MoeExperts:
    """The experts' feed-forward; `num_experts` counts all, the `num_shared` always chosen ones last."""
    return select(
        "moe_experts",
        target,
        num_experts=num_experts,
        num_shared=num_shared,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
    )


def embedding(target: Target) -> Embedding:
    """Rows of a table."""
    return select("embedding", target)
