"""A folder of safetensors files: every header checked before any tensor is read.

The format: 8 bytes of header length, a JSON header with dtype, shape and byte range of each tensor, then
the data (https://github.com/huggingface/safetensors#format). The checks are here because a refusal must
name the file and the field; tensors are read through the safetensors library.
"""

from __future__ import annotations

import itertools
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as _short
from typing import Any

from tokenspeed.checkpoint.config import read_json
from tokenspeed.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
MAX_TENSOR_BYTES = 1 << 48

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SafeTensor:
    """Where one tensor lies: the file, its dtype in safetensors' words, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def read_headers(folder: Path) -> dict[str, SafeTensor]:
    """Every tensor of the folder's safetensors files, by name.

    With an index only the files that it names are read, and each must hold what the index says; without,
    model.safetensors, or all files of the folder under other names. Raises `CheckpointError` naming file and field.
    """
    index = folder / INDEX
    if not index.is_file():
        single = folder / SINGLE
        files = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: no *.safetensors file")
        return _merged(files)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object that maps tensors to files")
    for name, file in weight_map.items():
        if not name.isprintable():
            raise CheckpointError(f"{index}: weight_map: {_short(name)} is not a printable name")
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index}: weight_map.{name}: {_short(file)} is no file name of this folder")
    tensors = _merged([folder / file for file in sorted(set(weight_map.values()))])
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{folder / file}: tensor {name} is missing, {INDEX} says that it is here")
    return tensors


def _merged(files: list[Path]) -> dict[str, SafeTensor]:
    tensors: dict[str, SafeTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise CheckpointError(f"{file}: tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    return tensors


def read_header(file: Path) -> dict[str, SafeTensor]:
    """The tensors of one file. Raises `CheckpointError` naming the file and the field."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file}: header length: the file has only {size} bytes")
            length = struct.unpack("<Q", prefix)[0]
            if not 2 <= length <= MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: header length {length} is not from 2 to {MAX_HEADER_BYTES}")
            if 8 + length > size:
                raise CheckpointError(f"{file}: header length {length} is past the end of the file ({size} bytes)")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from error
    return _checked(file, _parsed(file, raw), size - 8 - length)


def _parsed(file: Path, raw: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            names = [name for name, _ in pairs]
            raise CheckpointError(f"{file}: header: {next(n for n in names if names.count(n) > 1)} appears twice")
        return fields

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: header is not a JSON object")
    header.pop("__metadata__", None)
    return header


def _checked(file: Path, header: dict[str, Any], data_bytes: int) -> dict[str, SafeTensor]:
    tensors: dict[str, SafeTensor] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not name.isprintable():
            raise CheckpointError(f"{file}: tensor {name!r}: the name is not printable")
        if not isinstance(entry, dict):
            raise CheckpointError(f"{file}: tensor {name}: not an object")
        dtype, shape, offsets = entry.get("dtype"), _naturals(entry.get("shape")), _naturals(entry.get("data_offsets"))
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
            raise CheckpointError(f"{file}: tensor {name}: dtype {_short(dtype)} is not known")
        if shape is None:
            raise CheckpointError(f"{file}: tensor {name}: shape {_short(entry.get('shape'))} is not a list of sizes")
        if offsets is None or len(offsets) != 2:
            raise CheckpointError(
                f"{file}: tensor {name}: data_offsets {_short(entry.get('data_offsets'))} is no pair of offsets"
            )
        begin, end = offsets
        if begin > end:
            raise CheckpointError(f"{file}: tensor {name}: data_offsets {offsets} are reversed")
        if end > data_bytes:
            raise CheckpointError(
                f"{file}: tensor {name}: data_offsets {offsets} are past the end of the data ({data_bytes} bytes)"
            )
        num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
        if num_bytes > MAX_TENSOR_BYTES:
            raise CheckpointError(f"{file}: tensor {name}: shape {shape} overflows")
        if num_bytes != end - begin:
            raise CheckpointError(
                f"{file}: tensor {name}: shape {shape} of {dtype} is {num_bytes} bytes, data_offsets span {end - begin}"
            )
        tensors[name] = SafeTensor(file, dtype, tuple(shape), num_bytes)
        ranges.append((begin, end, name))
    ranges.sort()
    for (_, end, name), (begin, _, other) in itertools.pairwise(ranges):
        if begin < end:
            raise CheckpointError(f"{file}: tensor {other}: data_offsets overlap those of {name}")
    return tensors


def _naturals(value: object) -> list[int] | None:
    if not isinstance(value, list):
        return None
    naturals = [item for item in value if isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62]
    return naturals if len(naturals) == len(value) else None
