"""Grouped-query attention over a paged KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from tokenspeed.kernels import ops
from tokenspeed.layers.forward import ForwardInput, KVSpec, LayerKV
from tokenspeed.layers.linear import ColumnLinear, RowLinear
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.layers.rotary import RotaryTable
from tokenspeed.parallel.placement import Boundary, Partial, Replicate, Shard


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

        return cls(
            positions=inputs.positions,
            kv_slots=inputs.kv_slots,
            decode=rows(0, inputs.num_decode),
            prefill=rows(inputs.num_decode, len(inputs.query_lens)),
        )


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

    def forward(self, qkv: torch.Tensor, inputs: AttentionInput, kv: LayerKV) -> torch.Tensor:
        """qkv [T, (Hq + 2 Hk) D], overwritten → [T, Hq D]."""
        heads = qkv.view(qkv.shape[0], self.num_heads + 2 * self.num_kv_heads, self.head_dim)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        q, k = self._rotate(q, k, inputs.positions, self.cos_sin)
        self._store((k, v), kv, inputs.kv_slots)
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
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.reshape(out.shape[0], self.num_heads * self.head_dim)


class GQAAttention(Module):
    """Projection to q, k and v in one product, paged attention, projection back."""

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
        axis: str = "attn",
    ) -> None:
        super().__init__()
        self.boundary = Boundary(takes=Replicate(axis), gives=Partial(axis))
        rows = {"q_proj": num_heads * head_dim, "k_proj": num_kv_heads * head_dim, "v_proj": num_kv_heads * head_dim}
        self.qkv_proj = ColumnLinear(ctx, hidden_size, rows, axis=axis, bias=qkv_bias)
        self.attention = PagedAttention(
            ctx,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rotary=rotary,
            scale=head_dim**-0.5,
            axis=axis,
        )
        self.o_proj = RowLinear(ctx, num_heads * head_dim, {"o_proj": hidden_size}, axis=axis, bias=out_bias)
        self.kv_spec = KVSpec((("k", (num_kv_heads, head_dim)), ("v", (num_kv_heads, head_dim))))

    def stages(self) -> Iterable[tuple[str, Module]]:
        return (("qkv_proj", self.qkv_proj), ("attention", self.attention), ("o_proj", self.o_proj))

    def forward(self, x: torch.Tensor, inputs: AttentionInput, kv: LayerKV) -> torch.Tensor:
        """x [T, H] → [T, H]; `kv` is this layer's cache, written in place."""
        out: torch.Tensor = self.o_proj(self.attention(self.qkv_proj(x), inputs, kv))
        return out
