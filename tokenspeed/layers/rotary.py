"""Rotary position embedding: its frequencies, their scaling, and the table of cosines and sines."""

from __future__ import annotations

import math
from collections.abc import Mapping
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


RopeScaling = LinearScaling | Llama3Scaling | DivisorScaling


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
        supported = "default, linear, llama3"
        raise CheckpointError(f"{file}: rope_scaling.rope_type {_short(kind)} is not supported ({supported})")

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """[D/2] float32, radians a position."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequencies = 1.0 / (self.theta**exponents)
        return frequencies if self.scaling is None else self.scaling.apply(frequencies)


class RotaryTable:
    """cos_sin [P, D] float32: row p holds cos(p θ_i), then sin(p θ_i), i < D/2. One table serves all layers.

    Angles are products in float32, as the models were trained with them.
    """

    def __init__(self, rope: Rope, head_dim: int, max_positions: int, device: torch.device) -> None:
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, rope.frequencies(head_dim))
        self.cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)
