"""The tensors of a Hugging Face folder as a model wants them: floats, dequantised where the file is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from tokenspeed.checkpoint.quantisation import Fp8Blocks, PackedInt4, Quantisation
from tokenspeed.checkpoint.safetensors_folder import SafeTensor, read_headers
from tokenspeed.errors import CheckpointError

FLOATS = ("F64", "F32", "F16", "BF16")
PART_ELEMENTS = 1 << 20
"""Of a matrix that is read by rows."""

Part = tuple[slice, ...]
"""A cut of the leading dimensions of a tensor."""

Decode = Callable[..., torch.Tensor]
"""The stored tensors, in the order of `Stored.parts`, to the values."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of `shape` and the tensors of the file that hold it."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    decode: Decode


class FolderWeights:
    """Every tensor of the folder by name. Raises `CheckpointError` naming file and tensor for what does not fit."""

    def __init__(self, folder: Path, quantisation: Quantisation | None) -> None:
        self._tensors = read_headers(folder)
        stored = dict(_quantised(self._tensors, quantisation))
        inner = {part for tensor in stored.values() for part in tensor.parts}
        plain = ((name, tensor) for name, tensor in self._tensors.items() if name not in inner)
        self._stored = stored | {name: Stored(tensor.shape, (name,), _same) for name, tensor in plain}
        # In the order of the files, so that each is opened once.
        order = sorted(self._stored, key=lambda name: self._tensors[self._stored[name].parts[0]].file)
        self.shapes = {name: self._stored[name].shape for name in order}
        self.num_bytes = {
            name: sum(self._tensors[part].num_bytes for part in self._stored[name].parts) for name in order
        }
        self._open_file: Path | None = None
        self._handle: safe_open | None = None

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Copy the tensor into `target`, which has its shape and any float dtype. Decoded on the target's device."""
        stored = self._stored[name]
        if stored.decode is _same:
            target.copy_(self._read_float(name, ()))
        else:
            target.copy_(stored.decode(*(self._read(part).to(target.device) for part in stored.parts)))

    def read_parts(self, name: str, parts: Sequence[tuple[Part, torch.Tensor]]) -> None:
        """Copy parts of the tensor, each into its target, without reading the rest of it; one that is quantised is
        decoded as a whole."""
        if self._stored[name].decode is not _same:
            read_whole(self, name, parts)
            return
        for part, target in parts:
            target.copy_(self._read_float(name, part))

    def rows(self, name: str, first: int, last: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows [first, last) of a matrix of plain numbers in float32, in parts: (start, rows)."""
        step = max(1, PART_ELEMENTS // self.shapes[name][1])
        for start in range(first, last, step):
            yield start, self._read_float(name, (slice(start, min(start + step, last)),)).float()

    def close(self) -> None:
        """Close the file that was read last."""
        self._handle = None

    def _read_float(self, name: str, part: Part) -> torch.Tensor:
        tensor = self._tensors[name]
        if tensor.dtype not in FLOATS:
            raise CheckpointError(f"{tensor.file}: tensor {name}: dtype {tensor.dtype} is no float that is supported")
        return self._read(name, part)

    def _read(self, name: str, part: Part = ()) -> torch.Tensor:
        tensor = self._tensors[name]
        try:
            if self._handle is None or self._open_file != tensor.file:
                self._handle = safe_open(tensor.file, framework="pt")
                self._open_file = tensor.file
            handle: Any = self._handle
            values: torch.Tensor = handle.get_slice(name)[part] if part else handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{tensor.file}: tensor {name}: {error}") from error
        return values


class _Whole(Protocol):
    shapes: dict[str, tuple[int, ...]]

    def read_into(self, name: str, target: torch.Tensor) -> None: ...


def read_whole(reader: _Whole, name: str, parts: Sequence[tuple[Part, torch.Tensor]]) -> None:
    """Parts of a tensor that can only be read as a whole: once for all of them."""
    like = parts[0][1]
    whole = torch.empty(reader.shapes[name], dtype=like.dtype, device=like.device)
    reader.read_into(name, whole)
    for part, target in parts:
        target.copy_(whole[part])


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _quantised(tensors: dict[str, SafeTensor], quantisation: Quantisation | None) -> Iterator[tuple[str, Stored]]:
    """The quantised tensors of the folder under the names of what they mean."""
    if isinstance(quantisation, Fp8Blocks):
        for name in tensors:
            if name.endswith(".weight_scale_inv"):
                yield _fp8(tensors, name.removesuffix("_scale_inv"), quantisation)
    elif isinstance(quantisation, PackedInt4):
        for name in tensors:
            if name.endswith(".weight_packed"):
                yield _packed(tensors, name.removesuffix("_packed"), quantisation)


def _fp8(tensors: dict[str, SafeTensor], name: str, blocks: Fp8Blocks) -> tuple[str, Stored]:
    scale_name = f"{name}_scale_inv"
    weight = _part(tensors, name, "F8_E4M3", 2)
    scale = _part(tensors, scale_name, FLOATS, 2)
    rows, columns = weight.shape
    _expect(scale_name, scale, (-(-rows // blocks.rows), -(-columns // blocks.columns)), name)

    def decode(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        wide = scales.float().repeat_interleave(blocks.rows, 0)[:rows].repeat_interleave(blocks.columns, 1)
        return values.float() * wide[:, :columns]

    return name, Stored(weight.shape, (name, scale_name), decode)


def _packed(tensors: dict[str, SafeTensor], name: str, packing: PackedInt4) -> tuple[str, Stored]:
    names = (f"{name}_packed", f"{name}_scale", f"{name}_shape")
    packed = _part(tensors, names[0], "I32", 2)
    scale = _part(tensors, names[1], FLOATS, 2)
    _part(tensors, names[2], ("I32", "I64"), 1)
    rows, columns = packed.shape[0], packed.shape[1] * 8
    if columns % packing.group:
        raise CheckpointError(f"{packed.file}: tensor {name}: rows of {columns} are no whole groups of {packing.group}")
    _expect(names[1], scale, (rows, columns // packing.group), name)

    def decode(words: torch.Tensor, scales: torch.Tensor, shape: torch.Tensor) -> torch.Tensor:
        if shape.tolist() != [rows, columns]:
            held = f"{names[0]} holds {[rows, columns]}"
            raise CheckpointError(f"{packed.file}: tensor {names[2]} says {shape.tolist()}, but {held}")
        shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
        values = ((words.unsqueeze(-1) >> shifts) & 15) - 8
        grouped = values.view(rows, -1, packing.group).float() * scales.float().unsqueeze(-1)
        return grouped.view(rows, columns)

    return name, Stored((rows, columns), names, decode)


def _part(tensors: dict[str, SafeTensor], name: str, dtypes: str | tuple[str, ...], dims: int) -> SafeTensor:
    """The stored tensor, of one of these dtypes and with so many dimensions."""
    tensor = tensors.get(name)
    if tensor is None:
        raise CheckpointError(f"{next(iter(tensors.values())).file.parent}: tensor {name} is missing")
    allowed = (dtypes,) if isinstance(dtypes, str) else dtypes
    if tensor.dtype not in allowed or len(tensor.shape) != dims:
        raise CheckpointError(
            f"{tensor.file}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
            f"must be {' or '.join(allowed)} of {dims} dimensions"
        )
    return tensor


def _expect(name: str, tensor: SafeTensor, shape: tuple[int, ...], of: str) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {name} is {list(tensor.shape)}, must be {list(shape)} to scale {of}"
        )
