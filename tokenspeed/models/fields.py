"""The fields of config.json that families share, checked. Errors are `CheckpointError`s naming file and field."""

from __future__ import annotations

import math
from dataclasses import dataclass
from reprlib import repr as _short

from tokenspeed.checkpoint.config import ModelConfig, flag, positive_int
from tokenspeed.errors import CheckpointError
from tokenspeed.layers.attention import GQAAttention
from tokenspeed.layers.module import BuildContext
from tokenspeed.layers.rotary import Rope, RotaryTable


def number(config: ModelConfig, name: str, default: float) -> float:
    """A finite number of at least 0."""
    value = config.hf.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise CheckpointError(f"{config.file}: {name} must be a number of at least 0, got {_short(value)}")
    return float(value)


def switch(config: ModelConfig, name: str) -> bool:
    """True or false, false if it is missing."""
    return flag(config.hf, name, config.file)


def size(config: ModelConfig, name: str) -> int:
    """A positive integer."""
    return positive_int(config.hf, name, config.file)


MOST = 1 << 12
"""Largest believable count: a corrupt one is refused before anything is made so many times."""


def count(config: ModelConfig, name: str, default: int = 0) -> int:
    """An integer from 0 to `MOST`, `default` if it is missing or null."""
    value = config.hf.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        raise CheckpointError(f"{config.file}: {name} must be an integer from 0 to {MOST}, got {_short(value)}")
    return value


def divisible(config: ModelConfig, name: str, divisor: str) -> None:
    """Refuse the sizes `name` and `divisor` unless the first is a multiple of the second."""
    of, by = size(config, name), size(config, divisor)
    if of % by:
        raise CheckpointError(f"{config.file}: {name} ({of}) must be a multiple of {divisor} ({by})")


def at_most(config: ModelConfig, name: str, value: int, limit: int, of: str) -> None:
    """Refuse a `value` over `limit`, which `of` names."""
    if value > limit:
        raise CheckpointError(f"{config.file}: {name} ({value}) is more than {of} ({limit})")


def full_attention_only(config: ModelConfig) -> None:
    """Refuse a sliding window that is in use: every token here sees all tokens before it."""
    window = config.hf.get("sliding_window")
    # Qwen writes a window that use_sliding_window switches on; families without that switch mean what they write.
    if window is not None and config.hf.get("use_sliding_window", True):
        raise CheckpointError(f"{config.file}: sliding_window {_short(window)} is not supported (full attention)")


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """What the stack of layers needs to know."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    rms_norm_eps: float
    tied: bool

    @classmethod
    def of(cls, config: ModelConfig) -> DecoderShape:
        hf = config.hf
        if hf.get("hidden_act", "silu") != "silu":
            raise CheckpointError(f"{config.file}: hidden_act {_short(hf['hidden_act'])} is not supported (silu)")
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=size(config, "hidden_size"),
            num_layers=size(config, "num_hidden_layers"),
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            tied=switch(config, "tie_word_embeddings"),
        )


@dataclass(frozen=True, slots=True)
class GQA:
    """Heads of grouped-query attention, and the rotary table that all layers share."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary: RotaryTable

    @classmethod
    def of(cls, config: ModelConfig, ctx: BuildContext) -> GQA:
        hf, file = config.hf, config.file
        hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
        kv_heads = heads
        if hf.get("num_key_value_heads") is not None:
            divisible(config, "num_attention_heads", "num_key_value_heads")
            kv_heads = size(config, "num_key_value_heads")
        if hf.get("head_dim") is None:
            divisible(config, "hidden_size", "num_attention_heads")
        head_dim = hidden // heads if hf.get("head_dim") is None else size(config, "head_dim")
        if head_dim % 2:
            raise CheckpointError(f"{file}: head_dim ({head_dim}) must be even")
        rotary = RotaryTable(Rope.from_hf(hf, head_dim, file), head_dim, ctx.max_positions, ctx.device)
        return cls(hidden, heads, kv_heads, head_dim, rotary)

    def attention(
        self, ctx: BuildContext, *, qkv_bias: bool, out_bias: bool, qk_norm_eps: float | None = None
    ) -> GQAAttention:
        """One layer's attention, its tensors under `self_attn`."""
        return GQAAttention(
            ctx.inside("self_attn"),
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            rotary=self.rotary,
            qkv_bias=qkv_bias,
            out_bias=out_bias,
            qk_norm_eps=qk_norm_eps,
        )
