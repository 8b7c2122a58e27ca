"""How a checkpoint's weights are quantised, as its config.json says. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as _short
from typing import Any

from tokenspeed.errors import CheckpointError

SUPPORTED = "fp8 in blocks, compressed-tensors pack-quantized int4"


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """`x.weight` in float8 e4m3; each block of `rows` × `columns` has its factor in `x.weight_scale_inv`."""

    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class PackedInt4:
    """`x.weight_packed` holds eight 4-bit numbers an int32, lowest bits first, each 8 more than it means; every `group`
    of a row shares a factor in `x.weight_scale`. `x.weight_shape` repeats the shape."""

    group: int


Quantisation = Fp8Blocks | PackedInt4


def read_quantisation(hf: Mapping[str, Any], file: str) -> Quantisation | None:
    """From `quantization_config`, None without one. Raises `CheckpointError` naming what is not supported."""
    fields = hf.get("quantization_config")
    if fields is None:
        return None
    method = fields.get("quant_method") if isinstance(fields, dict) else fields
    if method == "fp8":
        return _fp8(fields, file)
    if method == "compressed-tensors":
        return _compressed(fields, file)
    raise CheckpointError(f"{file}: quantization_config: {_short(method)} is not supported ({SUPPORTED})")


def _fp8(fields: Mapping[str, Any], file: str) -> Fp8Blocks:
    block = fields.get("weight_block_size")
    sizes = block if isinstance(block, list) else []
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise CheckpointError(f"{file}: quantization_config.weight_block_size must be two sizes, got {_short(block)}")
    if fields.get("fmt", "e4m3") != "e4m3":
        raise CheckpointError(f"{file}: quantization_config.fmt {_short(fields['fmt'])} is not supported (e4m3)")
    return Fp8Blocks(*sizes)


def _compressed(fields: Mapping[str, Any], file: str) -> PackedInt4:
    name = f"{file}: quantization_config"
    if fields.get("format") != "pack-quantized":
        raise CheckpointError(f"{name}.format {_short(fields.get('format'))} is not supported (pack-quantized)")
    groups = fields.get("config_groups")
    if not isinstance(groups, dict) or len(groups) != 1:
        raise CheckpointError(f"{name}.config_groups must be one group, got {_short(groups)}")
    ((where, group),) = groups.items()
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{name}.config_groups.{where}.weights is missing")
    wanted = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group"}
    for field, value in wanted.items():
        if weights.get(field) != value:
            got = _short(weights.get(field))
            raise CheckpointError(f"{name}.config_groups.{where}.weights.{field} {got} is not supported ({value})")
    if weights.get("actorder"):
        raise CheckpointError(f"{name}.config_groups.{where}.weights.actorder is not supported")
    size = weights.get("group_size")
    if not isinstance(size, int) or size < 8 or size % 8:
        raise CheckpointError(f"{name}.config_groups.{where}.weights.group_size {_short(size)} is no multiple of 8")
    return PackedInt4(size)
