"""Multi-head latent attention (DeepSeek-AI, 2024): the cache holds one latent vector a token for all heads.

Shapes: T tokens, Hq heads of a rank, C latent rank, P rotated part, N part without position, V value size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tokenspeed.kernels import ops
from tokenspeed.layers.attention import Attention, AttentionInput, heads_of_a_rank, joined
from tokenspeed.layers.forward import KVSpec, LayerKV, Places
from tokenspeed.layers.linear import ColumnLinear, ReplicatedLinear, RowLinear
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.layers.rotary import RotaryTable
from tokenspeed.parallel.cost import Work
from tokenspeed.parallel.placement import Boundary, Partial, Replicate, Shard
from tokenspeed.parallel.shards import Piece


@dataclass(frozen=True, slots=True)
class MLAShape:
    """Sizes of one layer's attention. Without `q_lora_rank` queries are projected in one step."""

    num_heads: int
    kv_lora_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int
    q_lora_rank: int | None

    @property
    def qk_dim(self) -> int:
        return self.nope_dim + self.rope_dim


class LatentAttention(Module):
    """softmax(q kᵀ · scale) v over the latent cache; this step's latents enter it first.

    A decode row is absorbed: the key projection moves into its query and the value projection behind the sum, so
    that only latents are read. A prefill row is expanded: keys and values are projected once for all its tokens.
    `shape` is the model's; a rank has its share of the heads.
    """

    def __init__(
        self,
        ctx: BuildContext,
        shape: MLAShape,
        *,
        rotary: RotaryTable,
        interleaved: bool,
        scale: float,
        axis: str,
    ) -> None:
        super().__init__()
        self.boundary = Boundary(takes=Shard(axis, -1), gives=Shard(axis, -1))
        rank, rope, nope = shape.kv_lora_rank, shape.rope_dim, shape.nope_dim
        rows = nope + shape.v_dim
        piece = Piece(ctx.name("kv_b_proj.weight"), (slice(None),))
        self.kv_b = self.declare(ctx, (shape.num_heads * rows, rank), [piece], Shard(axis, 0))
        heads = heads_of_a_rank(ctx.mesh, axis, shape.num_heads)
        self.shape = dataclasses.replace(shape, num_heads=heads)
        self.scale, self.cos_sin = scale, rotary.cos_sin
        self._kv_bytes = (rank + rope) * ctx.dtype.itemsize
        # Per head its rows of the key projection [Hq, N, C], then of the value projection [Hq, V, C]: views.
        self.k_up, self.v_up = self.kv_b.view(heads, rows, rank).tensor_split((nope,), dim=1)
        self._rotate = ops.rotary(ctx.target, head_dim=rope, interleaved=interleaved)
        self._store = ops.kv_store(ctx.target)
        self._decode = ops.mla_decode(
            ctx.target, num_heads=heads, kv_lora_rank=rank, rope_dim=rope, block_size=ctx.block_size
        )
        self._prefill = ops.mla_prefill(
            ctx.target,
            num_heads=heads,
            nope_dim=nope,
            v_dim=shape.v_dim,
            kv_lora_rank=rank,
            rope_dim=rope,
            block_size=ctx.block_size,
        )

    def work(self, tokens: int) -> Work:
        """Weights; the latents of the context; absorbed, a score over C + P and a share over C for each pair, expanded
        over N + P and V."""
        shape = self.shape
        absorbed = 2.0 * shape.num_heads * (2 * shape.kv_lora_rank + shape.rope_dim)
        expanded = 2.0 * shape.num_heads * (shape.qk_dim + shape.v_dim)
        attention = Work(kv_bytes=self._kv_bytes, decode_pair_flop=absorbed, prompt_pair_flop=expanded)
        return super().work(tokens) + attention

    def enter(
        self, q: torch.Tensor, latent: torch.Tensor, k_rope: torch.Tensor, places: Places, kv: LayerKV
    ) -> torch.Tensor:
        """q [T, Hq (N + P)] and k_rope [T, P], both rotated in place, latent [T, C] → rotated queries [T, Hq, N + P];
        latents and rotated keys enter the cache."""
        shape = self.shape
        heads = q.view(-1, shape.num_heads, shape.qk_dim)
        self._rotate(heads[..., shape.nope_dim :], k_rope.unsqueeze(1), places.positions, self.cos_sin)
        self._store((torch.cat((latent, k_rope), dim=-1),), kv, places.kv_slots)
        return heads

    def attend(
        self, heads: torch.Tensor, inputs: AttentionInput, kv: LayerKV, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rotated queries [T, Hq, N + P] → [T, Hq V]."""
        shape, (cache,) = self.shape, kv
        decode, prefill = inputs.decode, inputs.prefill
        parts: list[torch.Tensor] = []
        if decode.num_rows:
            q_nope, q_rope = heads[: decode.num_rows].tensor_split((shape.nope_dim,), dim=-1)
            q_latent = torch.bmm(q_nope.transpose(0, 1), self.k_up).transpose(0, 1)
            sums = self._decode(
                q_latent.unsqueeze(1), q_rope.unsqueeze(1), cache, decode.block_table, decode.kv_len, self.scale
            )
            parts.append(torch.bmm(sums.squeeze(1).transpose(0, 1), self.v_up.transpose(1, 2)).transpose(0, 1))
        if prefill.num_rows:
            parts.append(
                self._prefill(
                    heads[decode.num_rows :],
                    cache,
                    prefill.block_table,
                    prefill.query_start,
                    prefill.kv_len,
                    prefill.query_lens,
                    prefill.kv_lens,
                    self.k_up,
                    self.v_up,
                    self.scale,
                )
            )
        return joined(parts, out)


class MLAAttention(Attention):
    """Down to the latents, norms, up to the queries, attention over latents, projection back; `shape` is the
    model's."""

    def __init__(
        self,
        ctx: BuildContext,
        shape: MLAShape,
        *,
        hidden_size: int,
        rotary: RotaryTable,
        interleaved: bool,
        scale: float,
        eps: float,
        bias: bool,
        axis: str = "attn",
    ) -> None:
        super().__init__()
        ctx = ctx.in_rows()  # as the block of a decode step takes them
        self.boundary = Boundary(takes=Replicate(axis), gives=Partial(axis))
        self.row_bytes = hidden_size * ctx.dtype.itemsize
        rank, queries = shape.q_lora_rank, shape.num_heads * shape.qk_dim
        down = {"kv_a_proj_with_mqa": shape.kv_lora_rank + shape.rope_dim}
        if rank is not None:
            down = {"q_a_proj": rank} | down
        self.down_proj = ReplicatedLinear(ctx, hidden_size, down, axis=axis, bias=bias)
        self.q_a_layernorm = None if rank is None else RMSNorm(ctx.inside("q_a_layernorm"), rank, eps, axis=axis)
        self.kv_a_layernorm = RMSNorm(ctx.inside("kv_a_layernorm"), shape.kv_lora_rank, eps, axis=axis)
        columns, name = (hidden_size, "q_proj") if rank is None else (rank, "q_b_proj")
        self.q_up_proj = ColumnLinear(ctx, columns, {name: queries}, axis=axis, bias=False)
        self.attention = LatentAttention(
            ctx, shape, rotary=rotary, interleaved=interleaved, scale=scale, axis=axis
        )
        self.o_proj = RowLinear(ctx, shape.num_heads * shape.v_dim, {"o_proj": hidden_size}, axis=axis, bias=bias)
        self.shape = self.attention.shape
        self.attended_width = self.shape.num_heads * shape.v_dim
        self.kv_spec = KVSpec((("latent", (shape.kv_lora_rank + shape.rope_dim,)),))
        self._weights_of_block = ops.MlaWeights(
            down=self.down_proj.plain,
            down_bias=self.down_proj.bias,
            q_gain=None if self.q_a_layernorm is None else self.q_a_layernorm.weight,
            kv_gain=self.kv_a_layernorm.weight,
            q_up=self.q_up_proj.plain,
            k_up=self.attention.k_up,
            v_up=self.attention.v_up,
            cos_sin=rotary.cos_sin,
            out=self.o_proj.plain,
            out_bias=self.o_proj.bias,
        )
        self._block = ops.mla_block_decode(
            ctx.target,
            hidden_size=hidden_size,
            num_heads=self.shape.num_heads,
            q_lora_rank=rank or 0,
            kv_lora_rank=shape.kv_lora_rank,
            nope_dim=shape.nope_dim,
            rope_dim=shape.rope_dim,
            v_dim=shape.v_dim,
            block_size=ctx.block_size,
            interleaved=interleaved,
        )

    def stages(self) -> Iterable[tuple[str, Module]]:
        yield "down_proj", self.down_proj
        if self.q_a_layernorm is not None:
            yield "q_a_layernorm", self.q_a_layernorm
        yield "kv_a_layernorm", self.kv_a_layernorm
        yield "q_up_proj", self.q_up_proj
        yield "attention", self.attention
        yield "o_proj", self.o_proj

    def enter(self, x: torch.Tensor, places: Places, kv: LayerKV) -> torch.Tensor:
        down = self.down_proj(x)
        if self.q_a_layernorm is not None:
            x, down = down.tensor_split((self.shape.q_lora_rank,), dim=-1)
            x = self.q_a_layernorm(x, None)[0]
        latent, k_rope = down.tensor_split((self.shape.kv_lora_rank,), dim=-1)
        latent = self.kv_a_layernorm(latent, None)[0]
        return self.attention.enter(self.q_up_proj(x), latent, k_rope, places, kv)

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
        (cache,), eps, scale = kv, self.kv_a_layernorm.eps, self.attention.scale
        edge = None if norm is None else norm.edge(residual)
        return self._block(x, edge, self._weights_of_block, eps, cache, inputs.cache_rows, scale)
