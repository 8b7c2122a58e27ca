"""Packed weights while they are loaded: rows are packed as they come, so that nothing is in memory twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from tokenspeed.errors import CheckpointError
from tokenspeed.kernels.forms import GROUP, Rows, pack_into, put_rows, rounded
from tokenspeed.layers.module import Weight
from tokenspeed.parallel.shards import Piece


class RowReader(Protocol):
    """A checkpoint that hands out matrices by rows."""

    shapes: dict[str, tuple[int, ...]]

    def rows(self, name: str, first: int, last: int) -> Iterator[tuple[int, Rows | torch.Tensor]]:
        """The rows [first, last), and perhaps some around them, in parts (start, rows): as they are stored where that
        is a form of the kernels, else in float32."""


def fill_packed(reader: RowReader, name: str, weight: Weight, piece: Piece) -> None:
    """Read one piece of a packed weight; plain numbers are rounded. Raises `CheckpointError` for those that 8 bits
    cannot hold."""
    row_cut, column_cut = (*piece.part, *(slice(None),) * (2 - len(piece.part)))
    num_rows, num_columns = reader.shapes[name]
    first, last, _ = row_cut.indices(num_rows)
    begin, end, _ = column_cut.indices(num_columns)
    columns = slice(begin, -(-end // GROUP) * GROUP)
    at = piece.at[0]
    assert isinstance(at, slice)
    for start, found in reader.rows(name, first, last):
        rows = round_rows(name, found) if isinstance(found, torch.Tensor) else found
        here, till = max(start, first), min(start + rows.values.shape[0], last)
        few = rows.window(here - start, till - start, columns)
        few = few if few.form == weight.form else few.as_mixed()
        put_rows(weight.parameter.data, (at.start or 0) + here - first, few)


def round_rows(name: str, values: torch.Tensor) -> Rows:
    """Rows of the tensor `name` in 8 bits."""
    rows = rounded(values)
    if not rows.scales.isfinite().all():
        raise CheckpointError(f"tensor {name}: 8 bits cannot hold numbers that are infinite, above 8e6, or none at all")
    return rows


class PackedRows:
    """One weight of plain numbers on its way into panels."""

    def __init__(self, weight: Weight) -> None:
        self._weight = weight
        self._missing = len(weight.pieces)
        self._rows: torch.Tensor | None = None

    def numbers(self) -> torch.Tensor:
        """What the pieces are read into, as if it were the parameter [rows, columns]."""
        if self._rows is None:
            data = self._weight.parameter.data
            self._rows = torch.empty(self._weight.shape, dtype=data.dtype, device=data.device)
        return self._rows

    def filled(self) -> None:
        """One more piece is there; with the last one, fill the weight."""
        self._missing -= 1
        if not self._missing:
            pack_into(self._weight.parameter.data, self.numbers())
            self._rows = None
