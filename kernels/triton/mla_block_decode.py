"""mla_block_decode in five launches for one token: [norm + down + queries] [rotation + KV + absorb] [attention]
[merge + values] [out].

The launches' boundaries, not bytes, are what a small batch pays for: each costs about 1 µs beside the 0.7 to 4.7 µs
of its bytes. More tokens take the norm and the projections as ops of their own, and from `MERGED` tokens on also the
merge and the value projection, since each (token, head) reads the head's projection again.

Launch chain: weights are requested before the wait. `_enter` releases the attention after its own wait, and so does
the attention the merge: both may therefore read the rows' lengths, which are older, before theirs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenspeed.kernels.block_weights import CacheRows, Edge, MlaWeights
from tokenspeed.kernels.registry import Kernel, Target, Traits
from tokenspeed.kernels.selection import select
from tokenspeed.kernels.triton.block_norm import norm_products
from tokenspeed.kernels.triton.launch import dependency_wait, dependent_launch, is_hopper, release_dependents
from tokenspeed.kernels.triton.linear import Linear
from tokenspeed.kernels.triton.mla_decode import MlaDecode, Shares, share_count

MERGED = 8
"""Tokens up to which the merge of the shares is part of the value projection."""


@triton.jit
def _turned(
    source, target, head_stride, cos, sin, tokens_inside,
    HEADS: tl.constexpr, PADDED: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Rotate HEADS heads [P] of one token at `source`, `head_stride` apart, into `target` [HEADS, P]."""
    head = tl.arange(0, PADDED)
    live = (head < HEADS) & tokens_inside
    HALF: tl.constexpr = P // 2
    if INTERLEAVED:
        d = tl.arange(0, P)
        pairs = tl.load(source + head[:, None] * head_stride + d[None, :], mask=live[:, None], other=0.0)
        a, b = tl.split(tl.reshape(pairs.to(tl.float32), (PADDED, HALF, 2)))
        turned = tl.join(a * cos[None, :] - b * sin[None, :], b * cos[None, :] + a * sin[None, :])
        turned = tl.reshape(turned, (PADDED, P)).to(target.dtype.element_ty)
        tl.store(target + head[:, None] * P + d[None, :], turned, mask=live[:, None])
    else:
        i = tl.arange(0, HALF)
        rows = source + head[:, None] * head_stride + i[None, :]
        a = tl.load(rows, mask=live[:, None], other=0.0).to(tl.float32)
        b = tl.load(rows + HALF, mask=live[:, None], other=0.0).to(tl.float32)
        to = target + head[:, None] * P + i[None, :]
        tl.store(to, (a * cos[None, :] - b * sin[None, :]).to(target.dtype.element_ty), mask=live[:, None])
        tl.store(to + HALF, (b * cos[None, :] + a * sin[None, :]).to(target.dtype.element_ty), mask=live[:, None])


@triton.jit(do_not_specialize=["tokens"])
def _enter(
    q, latents, gain, k_up, cos_sin, positions, kv_slots, cache, q_latent, q_rope, eps, tokens,
    q_stride, latents_stride, k_head, k_row, table_stride,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, N: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    BLOCK_C: tl.constexpr, TOKENS: tl.constexpr, INTERLEAVED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = C // BLOCK_C
    head = tl.program_id(0) // BLOCKS
    part = tl.program_id(0) % BLOCKS
    first = tl.program_id(1) * TOKENS
    if head < HEADS:
        # q_latent of one head: its queries' part without position times its key projection.
        n = tl.arange(0, N)
        c = part * BLOCK_C + tl.arange(0, BLOCK_C)
        up = tl.load(k_up + head * k_head + n[:, None] * k_row + c[None, :])
        dependency_wait(DEPENDENT)
        release_dependents(DEPENDENT)
        if TOKENS == 1:
            value = tl.load(q + first * q_stride + head * (N + P) + n).to(tl.float32)
            absorbed = tl.sum(up.to(tl.float32) * value[:, None], 0)
            tl.store(q_latent + (first * HEADS + head) * C + c, absorbed.to(q_latent.dtype.element_ty))
        else:
            t = first + tl.arange(0, TOKENS)
            inside = (t < tokens)[:, None]
            values = tl.load(q + t[:, None] * q_stride + head * (N + P) + n[None, :], mask=inside, other=0.0)
            absorbed = tl.dot(values, up).to(q_latent.dtype.element_ty)
            tl.store(q_latent + ((t * HEADS + head) * C)[:, None] + c[None, :], absorbed, mask=inside)
    else:
        dependency_wait(DEPENDENT)
        release_dependents(DEPENDENT)
        for token in range(first + part, tl.minimum(first + TOKENS, tokens), BLOCKS):
            angle = cos_sin + tl.load(positions + token) * table_stride + tl.arange(0, P // 2)
            cos = tl.load(angle)
            sin = tl.load(angle + P // 2)
            if head == HEADS:
                _turned(
                    q + token * q_stride + N, q_rope + token * (HEADS * P), N + P, cos, sin, True,
                    HEADS, HEADS_PADDED, P, INTERLEAVED,
                )  # fmt: skip
            else:
                slot = tl.load(kv_slots + token)
                c = tl.arange(0, C)
                latent = tl.load(latents + token * latents_stride + c).to(tl.float32)
                scale = tl.rsqrt(tl.sum(latent * latent, 0) / C + eps)
                latent = latent * scale * tl.load(gain + c).to(tl.float32)
                to = cache + slot * (C + P)
                tl.store(to + c, latent.to(cache.dtype.element_ty), mask=slot >= 0)
                _turned(
                    latents + token * latents_stride + C, to + C, P, cos, sin, slot >= 0, 1, 1, P, INTERLEAVED
                )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_shares"])
def _values(
    partial, lse, kv_len, v_up, out, num_rows, num_shares, v_head, v_row,
    HEADS: tl.constexpr, C: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_S: tl.constexpr, PARTS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """out[row, head] = v_up[head] · (merged result of the row's shares), BLOCK_V elements a program."""
    head = tl.program_id(0)
    row = tl.program_id(2)
    v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    c = tl.arange(0, C)
    up = tl.load(v_up + head * v_head + v[:, None] * v_row + c[None, :])
    first, count = share_count(kv_len, row, num_rows, num_shares, ROWS, BLOCK_N)
    dependency_wait(DEPENDENT)
    release_dependents(DEPENDENT)
    at = (first + row) * HEADS + head
    s = tl.arange(0, PARTS)
    shares = tl.load(lse + at + s * HEADS, mask=s < count, other=float("-inf"))
    peak = tl.max(shares, 0)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(shares - peak), 0)
    b = tl.arange(0, BLOCK_S)
    acc = tl.zeros([BLOCK_S, C], tl.float32)
    for start in tl.range(0, count, BLOCK_S, num_stages=2):
        present = start + b < count
        place = at + (start + b) * HEADS
        value = tl.load(partial + place[:, None] * C + c[None, :], mask=present[:, None], other=0.0)
        weight = tl.exp2(tl.load(lse + place, mask=present, other=float("-inf")) - peak)
        acc += value.to(tl.float32) * weight[:, None]
    merged = tl.sum(acc, 0) / tl.where(total == 0.0, 1.0, total)
    y = tl.sum(up.to(tl.float32) * merged[None, :], 1)
    tl.store(out + (row * HEADS + head) * V + v, y.to(out.dtype.element_ty))


@dataclass(frozen=True)
class Config:
    """What may be tuned. `enter_c`: elements of a latent query a program; `values`: (elements, shares a turn, warps) of
    the merge's programs, for a lone row and for several."""

    enter_c: int = 64
    enter_warps: int = 4
    lone_values: tuple[int, int, int] = (32, 16, 4)
    values: tuple[int, int, int] = (64, 16, 4)


class Attention(Protocol):
    """mla_decode, whole or as the shares that `_values` merges."""

    def __call__(
        self, q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float, /
    ) -> Tensor: ...

    def shares(
        self, q_latent: Tensor, q_rope: Tensor, kv_cache: Tensor, block_table: Tensor, kv_len: Tensor, scale: float, /
    ) -> Shares: ...


class MlaBlock:
    """The op for one shape, with the attention of a backend; see `ops.MlaBlockDecode`."""

    def __init__(self, target: Target, traits: Traits, attention: Attention, config: Config | None = None) -> None:
        self.num_heads, self.nope_dim, self.rank, self.rope_dim, self.v_dim, self.q_rank = (
            int(traits[name])
            for name in ("num_heads", "nope_dim", "kv_lora_rank", "rope_dim", "v_dim", "q_lora_rank")
        )
        self.interleaved = bool(traits["interleaved"])
        self.attention = attention
        self.config = config or Config()
        self.norm = select("rms_norm", target)
        self.linear = Linear()

    def __call__(
        self, x: Tensor, edge: Edge | None, weights: MlaWeights, eps: float, kv_cache: Tensor, rows: CacheRows,
        scale: float, /,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        project = self._project_one if x.shape[0] == 1 else self._project
        q, latents, residual = project(x, edge, weights, eps)
        q_latent, q_rope = self._enter(q, latents, weights, eps, kv_cache, rows)
        arguments = (q_latent.unsqueeze(1), q_rope.unsqueeze(1), kv_cache, rows.block_table, rows.kv_len, scale)
        if x.shape[0] <= MERGED:
            values = self._values(self.attention.shares(*arguments), rows.kv_len, weights.v_up)
        else:
            sums = self.attention(*arguments).squeeze(1)
            values = torch.bmm(sums.transpose(0, 1), weights.v_up.transpose(1, 2)).transpose(0, 1)
        return self.linear(values.flatten(1), weights.out, weights.out_bias), residual

    def _project_one(
        self, x: Tensor, edge: Edge | None, weights: MlaWeights, eps: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        if weights.q_gain is None:
            latents, q, residual = norm_products(x, edge, weights.down, weights.down_bias, weights.q_up)
            assert q is not None
            return q, latents, residual
        down, _, residual = norm_products(x, edge, weights.down, weights.down_bias)
        q, _, _ = norm_products(down[:, : self.q_rank], Edge(weights.q_gain, eps, None), weights.q_up)
        return q, down[:, self.q_rank :], residual

    def _project(
        self, x: Tensor, edge: Edge | None, weights: MlaWeights, eps: float
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        residual = None
        if edge is not None:
            x, residual = self.norm(x, edge.gain, edge.eps, edge.residual)
        if weights.q_gain is None:
            latents, q = self.linear.pair(x, weights.down, weights.down_bias, weights.q_up)
            return q, latents, residual
        down = self.linear(x, weights.down, weights.down_bias)
        x = self.norm(down[:, : self.q_rank], weights.q_gain, eps)[0]
        return self.linear(x, weights.q_up, None), down[:, self.q_rank :], residual

    def _enter(
        self, q: Tensor, latents: Tensor, weights: MlaWeights, eps: float, kv_cache: Tensor, rows: CacheRows
    ) -> tuple[Tensor, Tensor]:
        """Store the latents and rotated keys; the queries' absorbed part [R,Hq,C] and rotated part [R,Hq,P]."""
        tokens, heads = q.shape[0], self.num_heads
        q_latent = torch.empty(tokens, heads, self.rank, dtype=q.dtype, device=q.device)
        q_rope = torch.empty(tokens, heads, self.rope_dim, dtype=q.dtype, device=q.device)
        tile = 1 if tokens == 1 else max(16, min(64, triton.next_power_of_2(tokens)))
        block_c = min(self.rank, self.config.enter_c)
        dependent = is_hopper(q.device)
        _enter[(heads + 2) * (self.rank // block_c), triton.cdiv(tokens, tile)](
            q, latents, weights.kv_gain, weights.k_up, weights.cos_sin, rows.positions, rows.kv_slots, kv_cache,
            q_latent, q_rope, eps, tokens,
            q.stride(0), latents.stride(0), *weights.k_up.stride()[:2], weights.cos_sin.stride(0),
            HEADS=heads, HEADS_PADDED=triton.next_power_of_2(heads), N=self.nope_dim, C=self.rank, P=self.rope_dim,
            BLOCK_C=block_c, TOKENS=tile, INTERLEAVED=self.interleaved, DEPENDENT=dependent,
            num_warps=self.config.enter_warps, **dependent_launch(dependent),
        )  # fmt: skip
        return q_latent, q_rope

    def _values(self, found: Shares, kv_len: Tensor, v_up: Tensor) -> Tensor:
        """Merged and projected [R, Hq, V]."""
        rows, heads = kv_len.shape[0], self.num_heads
        out = torch.empty(rows, heads, self.v_dim, dtype=found.partial.dtype, device=kv_len.device)
        # A lone row is cut into as many shares as there are programs, and needs more hands.
        block_v, block_s, warps = self.config.lone_values if rows == 1 else self.config.values
        block_v = min(block_v, self.v_dim)
        dependent = is_hopper(kv_len.device)
        _values[heads, self.v_dim // block_v, rows](
            found.partial, found.lse, kv_len, v_up, out, rows, found.shares, *v_up.stride()[:2],
            HEADS=heads, C=self.rank, V=self.v_dim, BLOCK_V=block_v, BLOCK_N=found.block_n,
            ROWS=triton.next_power_of_2(rows), BLOCK_S=block_s, PARTS=triton.next_power_of_2(found.shares),
            DEPENDENT=dependent, num_warps=warps, **dependent_launch(dependent),
        )  # fmt: skip
        return out


def bind(target: Target, traits: Traits) -> Kernel:
    return MlaBlock(target, traits, MlaDecode(int(traits["kv_lora_rank"]), int(traits["rope_dim"])))
