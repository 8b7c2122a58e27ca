"""What the ops of a whole block take besides activations: its weights, its edge, and the rows' places in the cache."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tokenspeed.kernels.forms import Matrix


class Edge(NamedTuple):
    """The residual sum and norm between two blocks: x + residual (x alone without one), normed with `gain` [H]."""

    gain: Tensor
    eps: float
    residual: Tensor | None


class CacheRows(NamedTuple):
    """One token of each of R rows: positions, kv_slots [R] int64 (−1: not stored), kv_len [R] and block_table [R,M]
    int32, and the host's upper bounds of kv_len. Lengths count the row's new token."""

    positions: Tensor
    kv_slots: Tensor
    kv_len: Tensor
    block_table: Tensor
    kv_lens: tuple[int, ...]


class GqaWeights(NamedTuple):
    """qkv [(Hq + 2 Hk) D, H] with bias or None, gains [D] of the norms on q's and k's heads or None, cos_sin [P,D],
    out [H, Hq D] with bias or None; the matrices in any form."""

    qkv: Matrix
    qkv_bias: Tensor | None
    q_gain: Tensor | None
    k_gain: Tensor | None
    cos_sin: Tensor
    out: Matrix
    out_bias: Tensor | None


class MlpWeights(NamedTuple):
    """gate_up [2I,H] (gate first) and down [H,I] with bias or None; the matrices in any form."""

    gate_up: Matrix
    gate_up_bias: Tensor | None
    down: Matrix
    down_bias: Tensor | None


class DenseLayer(NamedTuple):
    """A layer of a dense decoder: the gains [H] of the norms before its two blocks and their eps, its attention with
    `head_eps` of the norms on heads and the scale of scores, its feed-forward."""

    attention_gain: Tensor
    attention: GqaWeights
    head_eps: float
    scale: float
    mlp_gain: Tensor
    mlp: MlpWeights
    eps: float


class MlaWeights(NamedTuple):
    """down [L + C + P, H] with bias or None: to the query's latent (L = 0 without one) and to the cache's; q_gain [L]
    or None, kv_gain [C]; q_up [Hq (N + P), L or H]; k_up [Hq,N,C], v_up [Hq,V,C]; cos_sin [P',P]; out [H, Hq V] with
    bias or None."""

    down: Tensor
    down_bias: Tensor | None
    q_gain: Tensor | None
    kv_gain: Tensor
    q_up: Tensor
    k_up: Tensor
    v_up: Tensor
    cos_sin: Tensor
    out: Tensor
    out_bias: Tensor | None


class MoeWeights(NamedTuple):
    """router [E,H] float32, bias [E] float32 or None for the choice; gate_up [E+S,2I,H], down [E+S,H,I]."""

    router: Tensor
    bias: Tensor | None
    gate_up: Tensor
    down: Tensor
