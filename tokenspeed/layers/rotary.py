"""Rotary position embedding: its frequencies, their scaling, and the table of cosines and sines."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from reprlib import repr as _short
from typing import Any

import torch

from tokenspeed.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions divided by `factor` (position interpolation, Chen et al., 2023)."""

    factor: float

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        return frequencies / self.factor


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        turns = self.original_max_positions * frequencies / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)
        return frequencies * kept + frequencies / self.factor * (1 - kept)


@dataclass(frozen=True, slots=True)
class DivisorScaling:
    """Each frequency divided by a number of its own, as GGUF files store a scaling already worked out."""

    divisors: tuple[float, ...]

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        return frequencies / torch.tensor(self.divisors, dtype=frequencies.dtype)


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al., 2023): wavelengths that turn less than `beta_slow` times in the original length are
    divided by `factor`, those that turn more than `beta_fast` times kept, those between blended.

    `magnitude` multiplies cosines and sines; `softmax_scale` multiplies the scale of the scores, where a model
    asks for it (DeepSeek's mscale_all_dim).
    """

    theta: float
    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    magnitude: float
    softmax_scale: float

    def apply(self, frequencies: torch.Tensor) -> torch.Tensor:
        half = frequencies.shape[0]
        low, high = self._index(half, self.beta_fast), self._index(half, self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = high - low if high > low else 0.001
        stretched = ((torch.arange(half, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
        return frequencies / self.factor * stretched + frequencies * (1 - stretched)

    def _index(self, half: int, turns: float) -> float:
        """The (real) index of the frequency that turns so many times in the original length."""
        wavelength = self.original_max_positions / turns
        return half * math.log(wavelength / (2 * math.pi)) / math.log(self.theta)


def yarn_magnitude(factor: float, mscale: float) -> float:
    """0.1 · mscale · ln(factor) + 1: what longer contexts ask of the size of the scores (Peng et al., 2023, eq. 22)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


RopeScaling = LinearScaling | Llama3Scaling | DivisorScaling | YarnScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """The frequencies θ_i = theta^(−2i/D), i < D/2, and how they are scaled."""

    theta: float
    scaling: RopeScaling | None

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], head_dim: int, file: str) -> Rope:
        """From config.json: `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

        Raises `CheckpointError` naming `file` and the field.
        """
        fields = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        if not isinstance(fields, Mapping):
            raise CheckpointError(f"{file}: rope_scaling must be an object, got {_short(fields)}")
        theta = fields.get("rope_theta", hf.get("rope_theta", 10000.0))
        kind = fields.get("rope_type", fields.get("type", "default"))

        def positive(name: str, value: object) -> float:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type,operator]
                raise CheckpointError(f"{file}: {name} must be a positive number, got {_short(value)}")
            return float(value)  # type: ignore[arg-type]

        theta = positive("rope_theta", theta)
        rotated = fields.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
        if rotated not in (None, 1):
            raise CheckpointError(f"{file}: partial_rotary_factor {_short(rotated)} is not supported (whole heads)")
        if kind in ("default", "none"):
            return cls(theta, None)
        if kind == "linear":
            return cls(theta, LinearScaling(positive("rope_scaling.factor", fields.get("factor"))))
        if kind == "divisors":
            values = fields.get("divisors", ())
            if len(values) != head_dim // 2:
                raise CheckpointError(f"{file}: rope_freqs has {len(values)} values, a head needs {head_dim // 2}")
            return cls(theta, DivisorScaling(tuple(positive("rope_scaling.divisors", value) for value in values)))
        if kind == "llama3":
            original = fields.get("original_max_position_embeddings", hf.get("original_max_position_embeddings"))
            low = positive("rope_scaling.low_freq_factor", fields.get("low_freq_factor"))
            high = positive("rope_scaling.high_freq_factor", fields.get("high_freq_factor"))
            if high <= low:
                raise CheckpointError(
                    f"{file}: rope_scaling.high_freq_factor ({high:g}) must be greater than low_freq_factor ({low:g})"
                )
            return cls(
                theta,
                Llama3Scaling(
                    factor=positive("rope_scaling.factor", fields.get("factor")),
                    low_freq_factor=low,
                    high_freq_factor=high,
                    original_max_positions=int(positive("rope_scaling.original_max_position_embeddings", original)),
                ),
            )
        if kind == "yarn":
            return cls(theta, _yarn(fields, hf, theta, positive))
        supported = "default, linear, llama3, yarn"
        raise CheckpointError(f"{file}: rope_scaling.rope_type {_short(kind)} is not supported ({supported})")

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied by."""
        return self.scaling.magnitude if isinstance(self.scaling, YarnScaling) else 1.0

    @property
    def softmax_scale(self) -> float:
        """What a model with `mscale_all_dim` multiplies its scores by."""
        return self.scaling.softmax_scale if isinstance(self.scaling, YarnScaling) else 1.0

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """[D/2] float32, radians a position."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequencies = 1.0 / (self.theta**exponents)
        return frequencies if self.scaling is None else self.scaling.apply(frequencies)


def _yarn(
    fields: Mapping[str, Any], hf: Mapping[str, Any], theta: float, positive: Callable[[str, object], float]
) -> YarnScaling:
    original = fields.get("original_max_position_embeddings", hf.get("original_max_position_embeddings"))
    factor = positive("rope_scaling.factor of yarn", fields.get("factor"))
    # Files write 0 or null for "not asked for".
    mscale, all_dim = (
        positive(f"rope_scaling.{name}", fields[name]) if fields.get(name) else None
        for name in ("mscale", "mscale_all_dim")
    )
    if fields.get("attention_factor") is not None:
        magnitude = positive("rope_scaling.attention_factor", fields["attention_factor"])
    elif mscale is not None and all_dim is not None:
        magnitude = yarn_magnitude(factor, mscale) / yarn_magnitude(factor, all_dim)
    else:
        magnitude = yarn_magnitude(factor, 1.0)
    return YarnScaling(
        theta=theta,
        factor=factor,
        original_max_positions=int(positive("rope_scaling.original_max_position_embeddings", original)),
        beta_fast=positive("rope_scaling.beta_fast", fields.get("beta_fast") or 32),
        beta_slow=positive("rope_scaling.beta_slow", fields.get("beta_slow") or 1),
        truncate=fields.get("truncate") is not False,
        magnitude=magnitude,
        softmax_scale=1.0 if all_dim is None else yarn_magnitude(factor, all_dim) ** 2,
    )


class RotaryTable:
    """cos_sin [P, D] float32: row p holds cos(p θ_i), then sin(p θ_i), i < D/2, each times the rope's magnitude.

    One table serves all layers. Angles are products in float32, as the models were trained with them.
    """

    def __init__(self, rope: Rope, head_dim: int, max_positions: int, device: torch.device) -> None:
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, rope.frequencies(head_dim))
        self.cos_sin = (torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.magnitude).to(device)
