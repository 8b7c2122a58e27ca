"""Grouped-query attention over a paged KV cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokenspeed.errors import ConfigError
from tokenspeed.kernels import ops
from tokenspeed.layers.forward import ForwardInput, KVSpec, LayerKV, Places
from tokenspeed.layers.linear import ColumnLinear, RowLinear
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.layers.rotary import RotaryTable
from tokenspeed.parallel.cost import Work
from tokenspeed.parallel.mesh import FLAGS, Mesh
from tokenspeed.parallel.placement import Boundary, Partial, Replicate, Shard
from tokenspeed.parallel.shards import Piece


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a forward pass as an attention op takes them (`ForwardInput` says what each field is)."""

    num_rows: int
    block_table: torch.Tensor
    query_start: torch.Tensor
    kv_len: torch.Tensor
    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class AttentionInput:
    """A forward pass as attention needs it, decode rows and prefill rows apart. Made once for all layers."""

    positions: torch.Tensor
    kv_slots: torch.Tensor
    decode: Rows
    prefill: Rows
    num_tokens: torch.Tensor | None
    cache_rows: ops.CacheRows
    """The rows of a step of decode rows alone, as the ops of whole blocks take them."""

    @classmethod
    def of(cls, inputs: ForwardInput) -> AttentionInput:
        def rows(start: int, stop: int) -> Rows:
            return Rows(
                num_rows=stop - start,
                block_table=inputs.block_table[start:stop],
                query_start=inputs.query_start[start : stop + 1],
                kv_len=inputs.kv_len[start:stop],
                query_lens=inputs.query_lens[start:stop],
                kv_lens=inputs.kv_lens[start:stop],
            )

        decode = rows(0, inputs.num_decode)
        return cls(
            positions=inputs.positions,
            kv_slots=inputs.kv_slots,
            decode=decode,
            prefill=rows(inputs.num_decode, len(inputs.query_lens)),
            num_tokens=inputs.num_tokens,
            cache_rows=ops.CacheRows(
                inputs.positions, inputs.kv_slots, decode.kv_len, decode.block_table, decode.kv_lens
            ),
        )


def cache_rows(inputs: ForwardInput) -> ops.CacheRows:
    """The rows of a step of decode rows alone, as the ops of whole blocks take them."""
    return ops.CacheRows(inputs.positions, inputs.kv_slots, inputs.kv_len, inputs.block_table, inputs.kv_lens)


def joined(parts: list[torch.Tensor], out: torch.Tensor | None) -> torch.Tensor:
    """What decode rows and prefill rows gave, [·, Hq, V] each, as one [T, Hq · V], in `out` if given."""
    if out is None:
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.reshape(whole.shape[0], -1)
    by_head = out.view(out.shape[0], *parts[0].shape[1:])
    if len(parts) == 1:
        by_head.copy_(parts[0])
    else:
        torch.cat(parts, out=by_head)
    return out


def heads_of_a_rank(mesh: Mesh, axis: str, num_heads: int) -> int:
    """Query heads that one rank of `axis` has. Raises `ConfigError` naming the flag if they cannot be dealt."""
    ranks = mesh.size(axis)
    if num_heads % ranks:
        fits = max(number for number in range(1, ranks) if num_heads % number == 0)
        raise ConfigError(
            f"{FLAGS.get(axis, axis)} {ranks}: num_attention_heads ({num_heads}) cannot be dealt to so many ranks; "
            f"the nearest number below is {fits}"
        )
    return num_heads // ranks


def ranks_of_a_kv_head(mesh: Mesh, axis: str, num_kv_heads: int) -> int:
    """How many neighbouring ranks of `axis` have the same KV heads: 1, or more where there are fewer heads than ranks.
    Raises `ConfigError` naming the flag if neither divides the other."""
    ranks = mesh.size(axis)
    if num_kv_heads % ranks == 0:
        return 1
    if ranks % num_kv_heads:
        fits = max(number for number in range(1, ranks) if num_kv_heads % number == 0 or number % num_kv_heads == 0)
        raise ConfigError(
            f"{FLAGS.get(axis, axis)} {ranks}: num_key_value_heads ({num_kv_heads}) is neither a multiple nor a "
            f"divisor of it; the nearest number below that fits is {fits}"
        )
    return ranks // num_kv_heads


class PagedAttention(Module):
    """softmax(q kᵀ · scale) v, causal, of rotated q and k; this step's k and v enter the cache first.

    One rank holds `num_heads` query heads and the `num_kv_heads` KV heads that they share.
    """

    def __init__(
        self,
        ctx: BuildContext,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: RotaryTable,
        scale: float,
        axis: str,
    ) -> None:
        super().__init__()
        self.boundary = Boundary(takes=Shard(axis, -1), gives=Shard(axis, -1))
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = scale
        self.cos_sin = rotary.cos_sin
        self._rotate = ops.rotary(ctx.target, head_dim=head_dim, interleaved=False)
        self._store = ops.kv_store(ctx.target)
        self._decode = ops.mha_decode(
            ctx.target, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=ctx.block_size
        )
        self._prefill = ops.mha_prefill(
            ctx.target, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=ctx.block_size
        )
        self._kv_bytes = 2 * num_kv_heads * head_dim * ctx.dtype.itemsize

    def work(self, tokens: int) -> Work:
        """Keys and values of the context; a score and a share of a value for each pair."""
        pair = 4.0 * self.num_heads * self.head_dim
        return Work(kv_bytes=self._kv_bytes, decode_pair_flop=pair, prompt_pair_flop=pair)

    def enter(self, qkv: torch.Tensor, places: Places, kv: LayerKV) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hk) D], overwritten → rotated queries [T, Hq, D]; keys and values enter the cache."""
        heads = qkv.view(qkv.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = self._rotate(q, k, places.positions, self.cos_sin)
        self._store((k, v), kv, places.kv_slots)
        return q

    def attend(
        self, q: torch.Tensor, inputs: AttentionInput, kv: LayerKV, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rotated queries [T, Hq, D] → [T, Hq D]."""
        k_cache, v_cache = kv
        decode, prefill = inputs.decode, inputs.prefill
        parts: list[torch.Tensor] = []
        if decode.num_rows:
            rows = q[: decode.num_rows]
            parts.append(
                self._decode(rows, k_cache, v_cache, decode.block_table, decode.kv_len, decode.kv_lens, self.scale)
            )
        if prefill.num_rows:
            parts.append(
                self._prefill(
                    q[decode.num_rows :],
                    k_cache,
                    v_cache,
                    prefill.block_table,
                    prefill.query_start,
                    prefill.kv_len,
                    prefill.query_lens,
                    prefill.kv_lens,
                    self.scale,
                )
            )
        return joined(parts, out)


class QKNorm(Module):
    """An RMS norm over each head of q and of k, v as it is. Each rank norms the heads that it holds."""

    def __init__(
        self, ctx: BuildContext, *, num_heads: int, num_kv_heads: int, head_dim: int, eps: float, axis: str
    ) -> None:
        super().__init__()
        self.boundary = Boundary(takes=Shard(axis, -1), gives=Shard(axis, -1))
        self.num_heads, self.num_kv_heads, self.head_dim, self.eps = num_heads, num_kv_heads, head_dim, eps
        self.q_weight, self.k_weight = (
            self.declare(ctx, (head_dim,), [Piece(ctx.name(f"{name}.weight"), (slice(None),))], Replicate(axis))
            for name in ("q_norm", "k_norm")
        )
        self._apply_norm = ops.rms_norm(ctx.target)

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hk) D] → the same, a new tensor."""
        rows, size = qkv.shape[0], self.head_dim
        ends = (self.num_heads * size, (self.num_heads + self.num_kv_heads) * size)
        q, k, v = qkv.tensor_split(ends, dim=-1)
        q = self._apply_norm(q.reshape(-1, size), self.q_weight, self.eps)[0]
        k = self._apply_norm(k.reshape(-1, size), self.k_weight, self.eps)[0]
        return torch.cat((q.view(rows, -1), k.view(rows, -1), v), dim=-1)


class Attention(Module):
    """What a decoder layer asks of its attention: `kv_spec`, and hidden states in and out.

    `forward` is `enter`, `attend` and `leave`. The first and the last depend on the number of tokens alone, and may be
    captured; whatever depends on rows and their lengths is in between.
    """

    kv_spec: KVSpec
    attended_width: int
    """Hq · V of a rank."""

    def forward(self, x: torch.Tensor, inputs: AttentionInput, kv: LayerKV) -> torch.Tensor:
        """x [T, H] → [T, H]; `kv` is this layer's cache, written in place."""
        return self.leave(self.attend(self.enter(x, inputs, kv), inputs, kv))

    @abstractmethod
    def enter(self, x: torch.Tensor, places: Places, kv: LayerKV) -> torch.Tensor:
        """x [T, H] → queries [T, Hq, …]; what the cache keeps of these tokens enters it."""

    @abstractmethod
    def attend(
        self, q: torch.Tensor, inputs: AttentionInput, kv: LayerKV, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Queries [T, Hq, …] over the cache → [T, Hq · V], in `out` if given."""

    @abstractmethod
    def leave(self, attended: torch.Tensor) -> torch.Tensor:
        """[T, Hq · V] → [T, H]."""

    @abstractmethod
    def decode(
        self, x: torch.Tensor, norm: RMSNorm | None, residual: torch.Tensor | None, inputs: AttentionInput, kv: LayerKV
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A step of decode rows alone, from before the norm: x and residual [R, H] → (what attention adds,
        x + residual). Without a norm x is normed already, and nothing else comes back."""


class GqaSizes(NamedTuple):
    """What the ops of whole blocks are chosen by, of one rank."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int


class GQAAttention(Attention):
    """Projection to q, k and v in one product, a norm of the heads where `qk_norm_eps` is given, paged attention,
    projection back. `num_heads` and `num_kv_heads` are those of the model; a rank has its share."""

    def __init__(
        self,
        ctx: BuildContext,
        *,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        rotary: RotaryTable,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm_eps: float | None = None,
        axis: str = "attn",
    ) -> None:
        super().__init__()
        self.boundary = Boundary(takes=Replicate(axis), gives=Partial(axis))
        self.row_bytes = hidden_size * ctx.dtype.itemsize
        rows = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
        columns_out = num_heads * head_dim
        shared_by = ranks_of_a_kv_head(ctx.mesh, axis, num_kv_heads)
        num_heads = heads_of_a_rank(ctx.mesh, axis, num_heads)
        num_kv_heads = num_kv_heads * shared_by // ctx.mesh.size(axis)
        sharing = {"k_proj": shared_by, "v_proj": shared_by}
        self.qkv_proj = ColumnLinear(ctx, hidden_size, rows, axis=axis, bias=qkv_bias, shared_by=sharing)
        self.qk_norm = (
            None
            if qk_norm_eps is None
            else QKNorm(
                ctx, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, eps=qk_norm_eps, axis=axis
            )
        )
        self.attention = PagedAttention(
            ctx,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary=rotary,
            scale=head_dim**-0.5,
            axis=axis,
        )
        self.o_proj = RowLinear(ctx, columns_out, {"o_proj": hidden_size}, axis=axis, bias=out_bias)
        self.attended_width = num_heads * head_dim
        self.kv_spec = KVSpec((("k", (num_kv_heads, head_dim)), ("v", (num_kv_heads, head_dim))))
        self._head_eps, self._scale = 0.0 if qk_norm_eps is None else qk_norm_eps, self.attention.scale
        self._weights_of_block = ops.GqaWeights(
            qkv=self.qkv_proj.weight,
            qkv_bias=self.qkv_proj.bias,
            q_gain=None if self.qk_norm is None else self.qk_norm.q_weight,
            k_gain=None if self.qk_norm is None else self.qk_norm.k_weight,
            cos_sin=rotary.cos_sin,
            out=self.o_proj.weight,
            out_bias=self.o_proj.bias,
        )
        self.sizes = GqaSizes(hidden_size, num_heads, num_kv_heads, head_dim, ctx.block_size)
        self._block = ops.gqa_block_decode(
            ctx.target,
            **self.sizes._asdict(),
            qkv_form=ops.form_of(self.qkv_proj.weight),
            out_form=ops.form_of(self.o_proj.weight),
        )

    @property
    def in_stack(self) -> tuple[ops.GqaWeights, float, float]:
        """What all layers as one op take of it: weights, eps of the norms on heads, scale of scores."""
        return self._weights_of_block, self._head_eps, self._scale

    def stages(self) -> Iterable[tuple[str, Module]]:
        yield "qkv_proj", self.qkv_proj
        if self.qk_norm is not None:
            yield "qk_norm", self.qk_norm
        yield "attention", self.attention
        yield "o_proj", self.o_proj

    def enter(self, x: torch.Tensor, places: Places, kv: LayerKV) -> torch.Tensor:
        qkv = self.qkv_proj(x)
        if self.qk_norm is not None:
            qkv = self.qk_norm(qkv)
        return self.attention.enter(qkv, places, kv)

    def attend(
        self, q: torch.Tensor, inputs: AttentionInput, kv: LayerKV, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.attention.attend(q, inputs, kv, out)

    def leave(self, attended: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.o_proj(attended)
        return out

    def decode(
        self, x: torch.Tensor, norm: RMSNorm | None, residual: torch.Tensor | None, inputs: AttentionInput, kv: LayerKV
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        k_cache, v_cache = kv
        edge = None if norm is None else norm.edge(residual)
        weights, eps, scale = self._weights_of_block, self._head_eps, self._scale
        return self._block(x, edge, weights, eps, k_cache, v_cache, inputs.cache_rows, scale)
