"""The ops that layers see. Each function here chooses once, while a model is built, and returns a callable
that costs nothing to dispatch.

Shapes: T tokens, R rows (requests), H hidden size, Hq query heads, Hk KV heads, D head dimension, P
positions. Activations are of `target.dtype` on the target's device. Tokens may lie apart (any stride in
the first dimension), so slices of a fused projection need no copy; the last dimension is contiguous.
The caches are [blocks, block_size, Hk, D], contiguous. Block tables and lengths are int32, token ids,
positions and slots int64. Results are new tensors unless an op says that it works in place.

All ops are on this one long page, a protocol and a function each, because it is the only face of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

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
from tokenspeed.kernels.forms import ROWS, Matrix, Packed, form_of, num_bytes, num_rows
from tokenspeed.kernels.peers import Peers
from tokenspeed.kernels.registry import KernelError, Target
from tokenspeed.kernels.sampler_state import SamplerState
from tokenspeed.kernels.selection import select
from tokenspeed.kernels.slot_state import DecodeInputs, DecodeRows, SlotState

__all__ = [
    "AllReduceNorm",
    "CacheRows",
    "DecodeInputs",
    "DecodeInputsOp",
    "DecodeRows",
    "DenseLayer",
    "Edge",
    "Embedding",
    "GqaBlockDecode",
    "GqaWeights",
    "KVStore",
    "KernelError",
    "Linear",
    "LmHeadSample",
    "Matrix",
    "MhaDecode",
    "MhaPrefill",
    "MlaBlockDecode",
    "MlaDecode",
    "MlaPrefill",
    "MlaWeights",
    "MlpBlockDecode",
    "MlpWeights",
    "MoeBlockDecode",
    "MoeExperts",
    "MoeRoute",
    "MoeWeights",
    "Packed",
    "Peers",
    "Quantise",
    "RmsNorm",
    "Rotary",
    "Sample",
    "SamplerState",
    "SiluMul",
    "SlotState",
    "StackDecode",
    "Target",
    "all_reduce_norm",
    "decode_inputs",
    "embedding",
    "embedding_of",
    "form_of",
    "gqa_block_decode",
    "kv_store",
    "linear",
    "linear_of",
    "lm_head",
    "lm_head_of",
    "lm_head_sample",
    "mha_decode",
    "mha_prefill",
    "mla_block_decode",
    "mla_decode",
    "mla_prefill",
    "mlp_block_decode",
    "moe_block_decode",
    "moe_experts",
    "moe_route",
    "num_bytes",
    "num_rows",
    "packed_embedding",
    "packed_linear",
    "packed_lm_head",
    "quantise",
    "rms_norm",
    "rotary",
    "sample",
    "silu_mul",
    "stack_decode",
]


class Linear(Protocol):
    def __call__(self, x: Tensor, weight: Matrix, bias: Tensor | None = None, /) -> Tensor:
        """x [T,K], weight [N,K], bias [N] → x · weightᵀ + bias, summed in float32; the weight is of the form chosen."""


class LmHead(Protocol):
    def __call__(self, x: Tensor, weight: Matrix, /) -> Tensor:
        """x [S,H], weight [V,H] → logits x · weightᵀ [S,V] in float32: sums that were never rounded to the type of x.

        Among bfloat16 logits of 20 lie 0.125 apart: two tokens become equal that are not.
        """


class RmsNorm(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor]:
        """x [T,H], weight [H], residual [T,H] or None → (y [T,H], r [T,H]).

        r = x + residual (x itself without a residual); y = r / sqrt(mean(r²) + eps) · weight, in float32
        from r as it is stored, rounded once (Zhang and Sennrich, 2019).
        """


class AllReduceNorm(Protocol):
    def __call__(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, peers: Peers, /
    ) -> tuple[Tensor, Tensor]:
        """As `RmsNorm` of Σ x over the ranks of `peers`, summed in float32 in their order, so that every rank gets the
        same bits: x [T,H] → (y [T,H], r [T,H]), T at most `peers.max_rows`.

        All ranks call it together, as often, with the same T. It waits on the device for the slowest.
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

        A slot is block × block_size + offset, or −1 for a token that is not stored, the padding of a captured
        step. The slots of one call are distinct otherwise.
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
        lengths and query_start as in `MhaPrefill`, cache as in `MlaDecode`; of a row with hundreds of query tokens,
        which is a prompt's, kv_lens is no bound but the length.
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
    def __call__(self, ids: Tensor, table: Matrix, /) -> Tensor:
        """ids [T], table [V,H] → table[ids] [T,H]."""


class DecodeInputsOp(Protocol):
    def __call__(self, rows: DecodeRows, state: SlotState, faults: Tensor, block_size: int, /) -> DecodeInputs:
        """What a decode step's R rows read and write, from the plan and the tables of their slots.

        A row's position is its slot's length, or what the plan says while that is −1; the length grows by the
        row's new token. `faults` [R] int32 gets what is wrong with each row: `DISAGREES`, `NO_BLOCK`. Rows with no
        new token are padding: of a slot of length 0 they have length 0 and store nothing. Slots are distinct
        otherwise.
        """


class Sample(Protocol):
    def __call__(self, logits: Tensor, slots: Tensor, state: SamplerState, /) -> Tensor:
        """logits [S,V] float32, overwritten, slots [S] int32 → tokens [S] int32; nothing waits for the host.

        Row s samples for slot `slots[s]` as `state` says; the slots of one call are distinct, −1 aside: such a
        row is padding, gives −1 and changes nothing. The token will stand at position `state.length[slot]`.
        Logits that hold NaN or +inf or are all −inf, and edits that leave no token, give −1.

        1. Rows with EDITS: + bias; then repetition over what was seen (x > 0: x / penalty, else x · penalty),
           − frequency · count − presence · [count > 0]; then stop ids before `min_length` are −inf. Rows with MASKED:
           what has no bit in the slot's mask is −inf.
        2. Rows without RANDOM: the most likely token, of equals the lowest id.
        3. Else p = exp((x − max) / temperature), cut by min_p, then top_k (0 is off), then top_p, each of which
           keeps every token as likely as the last one kept; the token is the first, in vocabulary order, whose
           cumulative probability exceeds the uniform number of (seed, position): the upper 53 bits of the
           (position + 1)-th output of SplitMix64 started at mix(seed) (Steele, Lea and Flood, 2014).

        `state.last_token[slot]` becomes the token, or 0 for −1. Rows with HISTORY count it in `state.seen`.
        """


class Quantise(Protocol):
    def __call__(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """x [T,H] → (values [T,H], scales [T, ⌈H / block⌉] float32): x ≈ values · scale of their block.

        Values are float8_e4m3fn (form "fp8", as DeepSeek V3 quantises activations) or int8, rounded to the nearest,
        of equals the even one. A block's scale is its largest magnitude / 448 or / 127; of a block of zeros it is 0.
        """


class GqaBlockDecode(Protocol):
    def __call__(
        self,
        x: Tensor,
        edge: Edge | None,
        weights: GqaWeights,
        eps: float,
        k_cache: Tensor,
        v_cache: Tensor,
        rows: CacheRows,
        scale: float,
        /,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of a decode step's R rows, one token each: x [R,H] → (y [R,H], residual [R,H] or None).

        With an edge, x + its residual is what is normed and what comes back as residual; without, x is normed
        already. Then: projection to q, k and v; the norms on their heads (`eps`) where there are gains; rotation;
        KV into the cache; attention; projection back. y is the block's own contribution, not yet added.
        """


class MlaBlockDecode(Protocol):
    def __call__(
        self,
        x: Tensor,
        edge: Edge | None,
        weights: MlaWeights,
        eps: float,
        kv_cache: Tensor,
        rows: CacheRows,
        scale: float,
        /,
    ) -> tuple[Tensor, Tensor | None]:
        """As `GqaBlockDecode`, latent attention: down to the latents, their norms (`eps`), up to the queries, rotation,
        latent and rotated key into the cache, absorbed attention, value projection, projection back."""


class MlpBlockDecode(Protocol):
    def __call__(self, x: Tensor, edge: Edge | None, weights: MlpWeights, /) -> tuple[Tensor, Tensor | None]:
        """x [T,H] → (y [T,H], residual or None), the edge as in `GqaBlockDecode`: down · (silu(gate) · up) of the
        normed x."""


class MoeBlockDecode(Protocol):
    def __call__(
        self, x: Tensor, edge: Edge | None, weights: MoeWeights, scale: float, num_tokens: Tensor | None = None, /
    ) -> tuple[Tensor, Tensor | None]:
        """x [T,H] → (y [T,H], residual or None), the edge as in `GqaBlockDecode`: scores of the normed x in float32,
        routing as `MoeRoute` says, the experts' sum."""


class StackDecode(Protocol):
    def __call__(
        self,
        x: Tensor,
        layers: tuple[DenseLayer, ...],
        caches: Sequence[tuple[Tensor, ...]],
        rows: CacheRows,
        gain: Tensor,
        eps: float,
        /,
    ) -> Tensor:
        """All layers of a dense decoder, for a decode step's R rows: x [R,H] → hidden [R,H], normed with `gain`.

        In each layer x += `GqaBlockDecode` of the normed x, over its (k, v) of `caches`; then x += `MlpBlockDecode` of
        the normed x. Matrices may be in other forms from layer to layer.
        """


class LmHeadSample(Protocol):
    def __call__(self, x: Tensor, edge: Edge | None, weight: Tensor, slots: Tensor, state: SamplerState, /) -> Tensor:
        """x [S,H], weight [V,H] → tokens [S] int32: the last norm (the edge), logits in float32, then `Sample`."""


def linear(target: Target) -> Linear:
    """Matrix product with a weight stored as [out, in]."""
    return select("linear", target)


def packed_linear(target: Target, *, matrix_form: str) -> Linear:
    """Matrix product with a packed weight."""
    return select("packed_linear", target, matrix_form=matrix_form)


def linear_of(target: Target, weight: Matrix) -> Linear:
    """The product with weights of this one's form."""
    return packed_linear(target, matrix_form=weight.form) if isinstance(weight, Packed) else linear(target)


def lm_head(target: Target) -> LmHead:
    """Logits of hidden states."""
    return select("lm_head", target)


def packed_lm_head(target: Target, *, matrix_form: str) -> LmHead:
    """Logits of hidden states from a packed weight."""
    return select("packed_lm_head", target, matrix_form=matrix_form)


def lm_head_of(target: Target, weight: Matrix) -> LmHead:
    """Logits from weights of this one's form."""
    return packed_lm_head(target, matrix_form=weight.form) if isinstance(weight, Packed) else lm_head(target)


def rms_norm(target: Target) -> RmsNorm:
    """Root-mean-square norm, with the residual addition before it."""
    return select("rms_norm", target)


def all_reduce_norm(target: Target) -> AllReduceNorm:
    """A sum over ranks with the norm behind it, through memory that they share."""
    return select("all_reduce_norm", target)


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


def packed_embedding(target: Target, *, matrix_form: str) -> Embedding:
    """Rows of a packed table."""
    return select("packed_embedding", target, matrix_form=matrix_form)


def embedding_of(target: Target, table: Matrix) -> Embedding:
    """Rows of tables of this one's form."""
    return packed_embedding(target, matrix_form=table.form) if isinstance(table, Packed) else embedding(target)


def decode_inputs(target: Target) -> DecodeInputsOp:
    """The inputs of a decode step; the dtype of `target` is not looked at."""
    return select("decode_inputs", target)


def sample(target: Target) -> Sample:
    """Tokens from logits on the device, every row by its own parameters; the dtype of `target` is not looked at."""
    return select("sample", target)


def quantise(target: Target, *, form: Literal["fp8", "int8"] = "fp8", block: int = 128) -> Quantise:
    """Activations or weights as 8-bit numbers with a scale a block; `block` is a power of two."""
    return select("quantise", target, form=form, block=block)


def gqa_block_decode(
    target: Target,
    *,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    interleaved: bool = False,
    qkv_form: str = ROWS,
    out_form: str = ROWS,
) -> GqaBlockDecode:
    """A whole attention block of a decode step (MHA, GQA and MQA), its two matrices in these forms."""
    return select(
        "gqa_block_decode",
        target,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        interleaved=interleaved,
        qkv_form=qkv_form,
        out_form=out_form,
    )


def mla_block_decode(
    target: Target,
    *,
    hidden_size: int,
    num_heads: int,
    q_lora_rank: int,
    kv_lora_rank: int,
    nope_dim: int,
    rope_dim: int,
    v_dim: int,
    block_size: int,
    interleaved: bool = True,
) -> MlaBlockDecode:
    """A whole latent-attention block of a decode step; `q_lora_rank` is 0 where queries have no latent."""
    return select(
        "mla_block_decode",
        target,
        hidden_size=hidden_size,
        num_heads=num_heads,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=kv_lora_rank,
        nope_dim=nope_dim,
        rope_dim=rope_dim,
        v_dim=v_dim,
        block_size=block_size,
        interleaved=interleaved,
    )


def mlp_block_decode(
    target: Target, *, hidden_size: int, intermediate_size: int, gate_up_form: str = ROWS, down_form: str = ROWS
) -> MlpBlockDecode:
    """A whole gated feed-forward of a decode step, its two matrices in these forms."""
    return select(
        "mlp_block_decode",
        target,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        gate_up_form=gate_up_form,
        down_form=down_form,
    )


def moe_block_decode(
    target: Target,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    num_shared: int = 0,
    num_groups: int = 1,
    top_groups: int = 1,
    scoring: Literal["softmax", "sigmoid"] = "softmax",
    normalise: bool = False,
) -> MoeBlockDecode:
    """A whole mixture of experts; `num_experts` counts the routed ones."""
    return select(
        "moe_block_decode",
        target,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_experts=num_experts,
        top_k=top_k,
        num_shared=num_shared,
        num_groups=num_groups,
        top_groups=top_groups,
        scoring=scoring,
        normalise=normalise,
    )


def lm_head_sample(target: Target, *, hidden_size: int, vocab_size: int) -> LmHeadSample:
    """From the last hidden states to tokens, on one rank."""
    return select("lm_head_sample", target, hidden_size=hidden_size, vocab_size=vocab_size)


def stack_decode(
    target: Target,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    interleaved: bool = False,
) -> StackDecode:
    """All layers of a dense decoder (MHA, GQA and MQA) in a decode step, and the last norm, on one rank."""
    return select(
        "stack_decode",
        target,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        interleaved=interleaved,
    )
