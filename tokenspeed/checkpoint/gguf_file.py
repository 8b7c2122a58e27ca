"""GGUF files: a bounded reader of the header, and tensors dequantised through the `gguf` package.

The format: "GGUF", version, counts, key-value pairs, tensor descriptions, padding, data (little endian;
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The header is parsed here rather than by the
package's reader, which takes 2.6 s for a vocabulary of 49,152 tokens (0.05 s here) and trusts the counts
in the file. Imports no torch.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import QuantError, dequantize

from tokenspeed.errors import CheckpointError

MAX_TENSORS = 1 << 20
MAX_KEYS = 1 << 16
MAX_STRING = 1 << 26
MAX_ARRAY = 1 << 22
MAX_NAME = 1 << 10
MAX_ARRAY_DEPTH = 4
MAX_DIMS = 4

LENGTH = struct.Struct("<Q")
STRING, ARRAY, BOOL = 8, 9, 7
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}

# One row of 2^18 elements at a time: twice as fast as rows as they are, which the package groups by 16.
PART_ELEMENTS = 1 << 18


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """Where one tensor lies: `shape` in row-major order (the file has it reversed), bytes from `start`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    start: int
    num_bytes: int


class GGUFFile:
    """An opened GGUF file: `metadata` as a plain dict, `tensors` by name. Close it, or use it in a `with`.

    Raises `CheckpointError` naming the file and the field for whatever is truncated or corrupt; a tensor
    that would lie past the end of the file is found on opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise CheckpointError(f"{path}: the file is empty") from error
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensor] = {}
        try:
            _Header(path, self._map).read_into(self.metadata, self.tensors)
        except CheckpointError:
            self._map.close()
            raise

    def close(self) -> None:
        """Give the mapping back. Arrays handed out are copies and stay valid."""
        self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def dequantised(self, name: str) -> npt.NDArray[np.float32]:
        """The whole tensor as a new float32 array, whatever type it is stored in."""
        shape = self.tensors[name].shape
        out = np.empty((math.prod(shape[:-1]), shape[-1]), dtype=np.float32)
        for start, rows in self.dequantised_rows(name):
            out[start : start + rows.shape[0]] = rows
        return out.reshape(shape)

    def dequantised_rows(
        self, name: str, first: int = 0, last: int | None = None, together: int = 1
    ) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
        """As `stored_rows`, as new float32 arrays."""
        tensor = self.tensors[name]
        for start, raw in self.stored_rows(name, first, last, together):
            yield start, self._floats(tensor, raw.reshape(1, -1)).reshape(raw.shape[0], tensor.shape[-1])

    def stored_rows(
        self, name: str, first: int = 0, last: int | None = None, together: int = 1
    ) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """The rows [first, last) of the tensor as they are stored, in parts: (start, bytes [n, bytes of a row]).

        Rows run along the last dimension, all others are one. A part has about `PART_ELEMENTS`, so that loading needs
        little memory beside the weights, and a multiple of `together` rows.
        """
        tensor = self.tensors[name]
        num_rows = math.prod(tensor.shape[:-1])
        row_bytes = tensor.num_bytes // num_rows
        step = max(1, PART_ELEMENTS // (tensor.shape[-1] * together)) * together
        last = num_rows if last is None else last
        for start in range(first, last, step):
            count = min(step, last - start)
            # A copy: a view that an unfinished reader still has would keep the file from being closed.
            raw = np.frombuffer(self._map, np.uint8, count * row_bytes, tensor.start + start * row_bytes).copy()
            yield start, raw.reshape(count, row_bytes)

    def _floats(self, tensor: GGUFTensor, raw: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        if tensor.type == GGMLQuantizationType.F64:
            return raw.view("<f8").astype(np.float32)
        try:
            values = dequantize(raw, tensor.type)
        except (NotImplementedError, QuantError) as error:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name}: type {tensor.type.name} is not supported"
            ) from error
        return np.array(values, dtype=np.float32) if tensor.type == GGMLQuantizationType.F32 else values


class _Header:
    """A cursor over the header. Every read is checked against the file's end and says what it was reading."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data = path, data
        self._size = len(data)
        self._at = 0

    def read_into(self, metadata: dict[str, Any], tensors: dict[str, GGUFTensor]) -> None:
        if self._take(4, "magic") != b"GGUF":
            raise self._error("magic", "not a GGUF file")
        version = self._scalar("I", "version")
        if version not in (2, 3):
            reason = "big-endian files" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise self._error("version", f"{reason} not supported")
        num_tensors = self._count("tensor_count", MAX_TENSORS)
        num_keys = self._count("metadata_kv_count", MAX_KEYS)
        for index in range(num_keys):
            key = self._name(f"key {index}")
            if key in metadata:
                raise self._error(key, "appears twice")
            metadata[key] = self._value(self._scalar("I", key), key, 0)
        descriptions = [self._description(index) for index in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment % 8 or alignment > 1 << 20:
            raise self._error("general.alignment", f"must be a positive multiple of 8, got {alignment!r}")
        data_start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in descriptions:
            if name in tensors:
                raise self._error(f"tensor {name}", "appears twice")
            tensors[name] = self._placed(name, shape, kind, data_start, offset, alignment)

    def _placed(
        self, name: str, shape: tuple[int, ...], kind: int, data_start: int, offset: int, alignment: int
    ) -> GGUFTensor:
        try:
            tensor_type = GGMLQuantizationType(kind)
        except ValueError as error:
            raise self._error(f"tensor {name}", f"unknown type {kind}") from error
        block, block_bytes = GGML_QUANT_SIZES[tensor_type]
        if shape[-1] % block:
            raise self._error(f"tensor {name}", f"row of {shape[-1]} is no multiple of {tensor_type.name}'s {block}")
        num_bytes = math.prod(shape) // block * block_bytes
        if offset % alignment:
            raise self._error(f"tensor {name}", f"offset {offset} is not aligned to {alignment}")
        if data_start + offset + num_bytes > self._size:
            raise self._error(
                f"tensor {name}", f"needs bytes up to {data_start + offset + num_bytes}, the file has {self._size}"
            )
        return GGUFTensor(name, shape, tensor_type, data_start + offset, num_bytes)

    def _description(self, index: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name(f"name of tensor {index}")
        field = f"tensor {name}"
        num_dims = self._scalar("I", field)
        if not 1 <= num_dims <= MAX_DIMS:
            raise self._error(field, f"{num_dims} dimensions")
        shape = tuple(self._scalar("Q", field) for _ in range(num_dims))[::-1]
        if min(shape) < 1:
            raise self._error(field, f"shape {shape}")
        return name, shape, self._scalar("I", field), self._scalar("Q", field)

    def _value(self, kind: int, field: str, depth: int) -> Any:
        if kind in SCALARS:
            return self._scalar(SCALARS[kind], field)
        if kind == STRING:
            return self._string(field)
        if kind != ARRAY:
            raise self._error(field, f"unknown value type {kind}")
        if depth == MAX_ARRAY_DEPTH:
            raise self._error(field, "arrays nested too deeply")
        element = self._scalar("I", field)
        count = self._count(field, MAX_ARRAY)
        if element in SCALARS:
            size = struct.calcsize(f"<{SCALARS[element]}")
            raw = self._take(count * size, field)
            return list(struct.unpack(f"<{count}{SCALARS[element]}", raw))
        if element == STRING:
            return self._strings(field, count)
        return [self._value(element, field, depth + 1) for _ in range(count)]

    def _count(self, field: str, limit: int) -> int:
        count: int = self._scalar("Q", field)
        if count > limit:
            raise self._error(field, f"{count} is more than {limit}")
        return count

    def _scalar(self, code: str, field: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}"), field))[0]

    def _name(self, field: str) -> str:
        name = self._string(field)
        if not name.isprintable() or len(name) > MAX_NAME:
            raise self._error(field, "not a printable name")
        return name

    def _string(self, field: str) -> str:
        return self._strings(field, 1)[0]

    def _strings(self, field: str, count: int) -> list[str]:
        # One flat loop: a vocabulary and its merges are 100,000 strings; half the time of one `_take` for each.
        data, size, at = self._data, self._size, self._at
        strings: list[str] = []
        try:
            for _ in range(count):
                (length,) = LENGTH.unpack_from(data, at)
                at += LENGTH.size
                if length > MAX_STRING or at + length > size:
                    raise self._error(field, f"a string of {length} bytes does not fit the file ({size} bytes)")
                strings.append(data[at : at + length].decode("utf-8"))
                at += length
        except struct.error as error:
            raise self._error(field, f"the file ends at byte {size}, within a string's length") from error
        except UnicodeDecodeError as error:
            raise self._error(field, "not UTF-8") from error
        self._at = at
        return strings

    def _take(self, count: int, field: str) -> bytes:
        end = self._at + count
        if end > self._size:
            raise self._error(field, f"the file ends at byte {self._size}, {end} are needed")
        raw = self._data[self._at : end]
        self._at = end
        return raw

    def _error(self, field: str, reason: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {field}: {reason}")
