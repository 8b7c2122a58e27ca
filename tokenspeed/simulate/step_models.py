"""How long a step takes on a device: step-time models by name.

A model reads the plan's arrays, as a device would, and gives seconds. Its constants are named fields with
their source, so that a result can be recomputed by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tokenspeed.batch import Plan


class StepModel(Protocol):
    """A model on a device."""

    @property
    def name(self) -> str:
        """What `--step-model` calls it."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache that a token takes on all layers."""

    @property
    def kv_tokens(self) -> int:
        """Tokens that the KV cache of the device holds."""

    @property
    def max_model_len(self) -> int:
        """The longest sequence, prompt and generated tokens."""

    def seconds(self, plan: Plan) -> float:
        """How long the device computes this step."""


@dataclass(frozen=True, slots=True)
class RooflineMoE:
    """A mixture-of-experts transformer bound by memory in decode and by arithmetic in prefill.

    A step takes `overhead + max(weight bytes / bandwidth, linear FLOP / rate) + decode KV bytes / bandwidth +
    prefill attention FLOP / rate`. Weights that every token uses are read once a step; of `num_experts` routed
    experts a layer, t tokens that each draw `top_k` at random hit `num_experts · (1 − (1 − top_k/num_experts)^t)`
    distinct ones in expectation.
    """

    name: str
    kv_bytes_per_token: int
    kv_tokens: int
    max_model_len: int
    shared_weight_bytes: float
    """Read in every step, whatever its tokens."""
    routed_weight_bytes: float
    """Of all routed experts of all layers."""
    num_experts: int
    top_k: int
    linear_flop: float
    """FLOP of the linear layers for a token."""
    attention_flop: float
    """FLOP of attention for a pair of a query token and a key token, over heads and layers."""
    bandwidth: float
    """Bytes a second that are reached."""
    flop_rate: float
    """FLOP a second that prefill reaches."""
    prefill_overhead: float
    """Seconds of launches and host in a step with prefill rows."""
    decode_overhead: float
    """Seconds of launches and host in a step of decode rows alone."""

    def distinct_experts(self, tokens: int) -> float:
        """Expected number of a layer's routed experts that a step of `tokens` tokens reads."""
        return float(self.num_experts * (1.0 - (1.0 - self.top_k / self.num_experts) ** tokens))

    def seconds(self, plan: Plan) -> float:
        """How long the device computes this step."""
        buffers, decode, rows = plan.buffers, plan.num_decode, plan.num_rows
        experts = self.distinct_experts(plan.num_tokens) / self.num_experts
        seconds = (self.shared_weight_bytes + self.routed_weight_bytes * experts) / self.bandwidth
        if decode:
            context = int(np.add.reduce(buffers.row_computed[:decode])) + decode
            kv_seconds = context * self.kv_bytes_per_token / self.bandwidth
        else:
            kv_seconds = 0.0
        if rows == decode:
            return self.decode_overhead + seconds + kv_seconds
        new = buffers.row_new[decode:rows].astype(np.float64)
        pairs = float(np.dot(new, buffers.row_computed[decode:rows] + (new + 1.0) / 2.0))
        seconds = max(seconds, plan.num_tokens * self.linear_flop / self.flop_rate)
        return self.prefill_overhead + seconds + kv_seconds + pairs * self.attention_flop / self.flop_rate


@dataclass(frozen=True, slots=True)
class Instant:
    """An engine that takes no time to speak of: its output is what the sessions themselves leave to be generated."""

    name: str = "instant"
    kv_bytes_per_token: int = 1
    kv_tokens: int = 64_000_000
    max_model_len: int = 163_840

    def seconds(self, plan: Plan) -> float:
        """A microsecond, so that rates are finite."""
        return 1e-6


# --- DeepSeek-V2-Lite's shape in bfloat16 on one H100 (80 GB, SXM) ---

_HIDDEN, _LAYERS, _HEADS, _VOCAB = 2048, 27, 16, 102_400
_NOPE, _ROPE, _VALUE, _LATENT = 128, 64, 128, 512
_EXPERT, _DENSE, _EXPERTS, _TOP_K, _SHARED = 1408, 10_944, 64, 6, 2
_BF16 = 2

_ATTENTION = (
    _HIDDEN * _HEADS * (_NOPE + _ROPE)
    + _HIDDEN * (_LATENT + _ROPE)
    + _LATENT * _HEADS * (_NOPE + _VALUE)
    + _HEADS * _VALUE * _HIDDEN
)
_ONE_EXPERT = 3 * _HIDDEN * _EXPERT
_MOE_LAYERS = _LAYERS - 1
_BODY = _LAYERS * _ATTENTION + 3 * _HIDDEN * _DENSE + _MOE_LAYERS * (_SHARED * _ONE_EXPERT + _EXPERTS * _HIDDEN)
"""Weights of the body that every token uses. The LM head is apart: it computes the sampled positions alone."""

H100_V2L = RooflineMoE(
    name="h100-v2l",
    kv_bytes_per_token=_LAYERS * (_LATENT + _ROPE) * _BF16,  # 31,104
    kv_tokens=1_130_000,  # what 80 GB leave beside 31 GB of weights, activations and a margin
    max_model_len=163_840,
    shared_weight_bytes=(_BODY + _VOCAB * _HIDDEN) * _BF16,  # 2.20 GB; with 6 of 64 experts 4.90 GB
    routed_weight_bytes=_MOE_LAYERS * _EXPERTS * _ONE_EXPERT * _BF16,  # 28.8 GB
    num_experts=_EXPERTS,
    top_k=_TOP_K,
    linear_flop=2.0 * (_BODY + _MOE_LAYERS * _TOP_K * _ONE_EXPERT),
    attention_flop=2.0 * _LAYERS * _HEADS * (_NOPE + _ROPE + _VALUE),
    bandwidth=0.75 * 3.15e12,  # a read-only stream measures 3.15 TB/s; good decode kernels reach three quarters
    flop_rate=5.3e14,  # two thirds of cuBLAS's 800 TFLOP/s: a cold prompt of 50,000 tokens takes 1.1 s
    prefill_overhead=1.0e-3,  # eager launches of 27 layers
    decode_overhead=0.3e-3,  # one graph replay, and what the host adds to it
)

STEP_MODELS: dict[str, StepModel] = {model.name: model for model in (H100_V2L, Instant())}
