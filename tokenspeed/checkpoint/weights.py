"""Weights from a checkpoint into a model: what is there is compared with what is needed before a byte is read."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from tokenspeed.checkpoint.config import ModelConfig, read_folder_quantisation
from tokenspeed.checkpoint.folder_weights import FolderWeights, Part
from tokenspeed.checkpoint.gguf_weights import GGUFWeights
from tokenspeed.checkpoint.packing import PackedRows, RowReader, fill_packed
from tokenspeed.checkpoint.random_weights import fill_random
from tokenspeed.checkpoint.source import Source
from tokenspeed.errors import CheckpointError
from tokenspeed.kernels.forms import PANELS, ROWS
from tokenspeed.kernels.platform import Platform
from tokenspeed.layers.module import Weight
from tokenspeed.parallel.shards import Piece, tensor_shape

Progress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all) after each tensor."""

Fill = tuple[Weight, Piece]
"""A parameter and what of it one checkpoint tensor fills."""

SHOWN = 4


class Loadable(Protocol):
    """What the loader needs of a model: its weights, and the tensors that it does without."""

    ignored: re.Pattern[str]

    def weights(self) -> Iterable[Weight]: ...


class WeightReader(RowReader, Protocol):
    """The tensors of one checkpoint under Hugging Face's names."""

    num_bytes: dict[str, int]

    def read_into(self, name: str, target: torch.Tensor) -> None:
        """Copy the tensor into `target`, which has its shape and any float dtype."""

    def read_parts(self, name: str, parts: Sequence[tuple[Part, torch.Tensor]]) -> None:
        """Copy parts of the tensor, each into its target. Where the file allows it, nothing else is read."""

    def close(self) -> None: ...


def open_weights(source: Source) -> WeightReader:
    """Open a checkpoint's tensors. Raises `CheckpointError` naming the file and field that is broken."""
    if source.kind == "gguf":
        return GGUFWeights(source.path)
    return FolderWeights(source.path, read_folder_quantisation(source.path))


def iterate_weights(source: Source) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor) of every tensor, under Hugging Face's names, one at a time."""
    with contextlib.closing(open_weights(source)) as reader:
        for name, shape in reader.shapes.items():
            tensor = torch.empty(shape, dtype=torch.float32)
            reader.read_into(name, tensor)
            yield name, tensor


def load_weights(model: Loadable, source: Source, progress: Progress | None = None) -> None:
    """Fill every parameter of `model` from `source`, or with random numbers if the source is a dummy.

    Raises `CheckpointError` in one line naming the missing, extra or misshapen tensors, before reading any.
    """
    if source.dummy:
        fill_random(model.weights(), progress)
        return
    weights = list(model.weights())
    wanted = _fills(weights)
    with contextlib.closing(open_weights(source)) as reader:
        _compare(tensor_shapes(weights), reader, model.ignored, source.path)
        total, done = sum(reader.num_bytes[name] for name in wanted), 0
        rows = {id(weight): PackedRows(weight) for weight in weights if weight.form == PANELS}
        for name in (name for name in reader.shapes if name in wanted):
            _fill(reader, name, wanted[name], rows)
            done += reader.num_bytes[name]
            if progress is not None:
                progress(done, total)


def tensor_shapes(weights: Iterable[Weight]) -> dict[str, tuple[int, ...]]:
    """The checkpoint tensors that fill these parameters over all ranks, in their order, with the shapes that they must
    have."""
    fills: dict[str, list[tuple[tuple[int, ...], Piece]]] = {}
    for weight in weights:
        for piece in weight.whole_pieces:
            fills.setdefault(piece.source, []).append((weight.whole_shape, piece))
    return {name: tensor_shape(pieces) for name, pieces in fills.items()}


def _fills(weights: Iterable[Weight]) -> dict[str, list[Fill]]:
    """What this rank needs of each checkpoint tensor."""
    fills: dict[str, list[Fill]] = {}
    for weight in weights:
        for piece in weight.pieces:
            fills.setdefault(piece.source, []).append((weight, piece))
    return fills


def stored_forms(source: Source) -> dict[str, str]:
    """The tensors of a checkpoint that kernels multiply as they are stored, with their forms."""
    if source.dummy or source.kind != "gguf":
        return {}
    with contextlib.closing(GGUFWeights(source.path)) as reader:
        return reader.forms


def _fill(reader: WeightReader, name: str, fills: list[Fill], packed_rows: Mapping[int, PackedRows]) -> None:
    plain = []
    for weight, piece in fills:
        if weight.form in (ROWS, PANELS):
            plain.append((weight, piece))
        else:
            fill_packed(reader, name, weight, piece)
    if not plain:
        return
    packed = [packed_rows.get(id(weight)) for weight, _ in plain]
    into = [
        weight.parameter.data[piece.at] if rows is None else rows.numbers()[piece.at]
        for rows, (weight, piece) in zip(packed, plain, strict=True)
    ]
    if any(piece.part for _, piece in plain):
        reader.read_parts(name, [(piece.part, numbers) for (_, piece), numbers in zip(plain, into, strict=True)])
    else:
        (numbers,) = into
        reader.read_into(name, numbers)
    for rows in packed:
        if rows is not None:
            rows.filled()


def default_dtype(config: ModelConfig, platform: Platform) -> torch.dtype:
    """The dtype to compute in when none is asked for.

    A float32 checkpoint stays float32. Anything else runs in bfloat16, except on a CPU that has no
    instructions for it. There bfloat16 reads half the bytes, but the embedded model differs from float32 by 0.001
    nats and in 2% of its best tokens, and float32 costs only speed.
    """
    slow = platform.vendor == "cpu" and platform.isa.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))
    return torch.float32 if config.dtype == "float32" or slow else torch.bfloat16


def _compare(
    needed: dict[str, tuple[int, ...]], reader: WeightReader, ignored: re.Pattern[str], path: Path
) -> None:
    shapes = reader.shapes
    missing = [name for name in needed if name not in shapes]
    extra = [name for name in shapes if name not in needed and ignored.fullmatch(name) is None]
    misshapen = [
        f"{name} is {list(shapes[name])}, must be {list(shape)}"
        for name, shape in needed.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = (("missing", missing), ("extra", extra), ("misshapen", misshapen))
    parts = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults if names]
    if parts:
        raise CheckpointError(f"{path}: tensors do not fit the configuration: {'; '.join(parts)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
