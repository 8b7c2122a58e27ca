"""How a weight matrix can lie in memory: as rows, or packed as the kernels that multiply it read it.

A packed matrix is panels of 16 rows, the last one padded with zeros; a panel is groups of 32 columns; a group is the
rows' scales, then their minimums, then their values, in 32-bit words of which neighbouring rows have neighbouring ones.
A weight is value · scale + minimum. `kernels/cpu/forms.h` has the same layout in C++.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PANEL_ROWS = 16
GROUP = 32
ROWS = "rows"
"""The form of a plain tensor [rows, columns]."""
PANELS = "panels"
"""The form of plain numbers, packed."""


class Packed(NamedTuple):
    """A matrix [rows, columns] in a packed form: `data` [panels, groups, …]."""

    data: Tensor
    form: str
    rows: int
    columns: int


Matrix = Tensor | Packed
"""A weight [N,K]: as rows, or packed."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """Values of `bits` bits with a scale for 32 of a row, and a minimum or what stands for zero: values are unsigned
    with a zero, or with minimums; signed without either."""

    bits: int
    scale: torch.dtype
    minimums: bool
    zero: int = 0

    @property
    def group_bytes(self) -> int:
        """Bytes of a group of a panel."""
        return PANEL_ROWS * (self.scale.itemsize * (2 if self.minimums else 1) + GROUP * self.bits // 8)


QUANTISED: Mapping[str, Quantised] = {
    "q4_0": Quantised(4, torch.float16, False, zero=8),
    "q4_1": Quantised(4, torch.float16, True),
    "q4_k": Quantised(4, torch.float32, True),
    "q8_0": Quantised(8, torch.float16, False),
}
"""The forms with fewer bits. `panels` are plain numbers, packed."""

FORMS = (ROWS, PANELS, *QUANTISED)


def form_of(matrix: Matrix) -> str:
    """The name of a matrix's form."""
    return matrix.form if isinstance(matrix, Packed) else ROWS


def num_rows(matrix: Matrix) -> int:
    """N of a matrix [N,K]."""
    return matrix.rows if isinstance(matrix, Packed) else matrix.shape[0]


def num_bytes(matrix: Matrix) -> int:
    """What is read when it is multiplied with."""
    data = matrix.data if isinstance(matrix, Packed) else matrix
    return data.numel() * data.element_size()


def packed_shape(form: str, rows: int, columns: int, dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of the data of a packed matrix [rows, columns] for activations of `dtype`."""
    outer = (-(-rows // PANEL_ROWS), -(-columns // GROUP))
    if form == PANELS:
        parts = _parts(dtype)
        return (*outer, GROUP // parts, PANEL_ROWS, parts), dtype
    return (*outer, QUANTISED[form].group_bytes), torch.uint8


def _parts(dtype: torch.dtype) -> int:
    """Numbers in a word of 32 bits."""
    return max(1, 4 // dtype.itemsize)


def _panelled(x: Tensor) -> Tensor:
    """[rows, groups, …] → [panels, groups, PANEL_ROWS, …], rows of zeros at the end."""
    panels = -(-x.shape[0] // PANEL_ROWS)
    padded = x.new_zeros((panels * PANEL_ROWS, *x.shape[1:]))
    padded[: x.shape[0]] = x
    return padded.view(panels, PANEL_ROWS, *x.shape[1:]).transpose(1, 2)


def pack(rows: Tensor) -> Packed:
    """A matrix [N,K] of floating numbers as panels."""
    num_rows, columns = rows.shape
    groups, parts = -(-columns // GROUP), _parts(rows.dtype)
    whole = torch.nn.functional.pad(rows, (0, groups * GROUP - columns)).view(num_rows, groups, parts, GROUP // parts)
    data = _panelled(whole).permute(0, 1, 4, 2, 3).contiguous()
    return Packed(data, PANELS, num_rows, columns)


def pack_quantised(form: str, values: Tensor, scales: Tensor, minimums: Tensor | None) -> Packed:
    """values [N,K] uint8 (8 bits: int8), scales and minimums [N, K / 32] → the matrix in `form`. K is whole groups.

    Scales and minimums must be numbers that the form's type holds.
    """
    kind = QUANTISED[form]
    num_rows, columns = values.shape
    groups, parts = columns // GROUP, 32 // kind.bits
    by_word = values.view(torch.uint8).view(num_rows, groups, parts, GROUP // parts)
    if kind.bits == 4:
        by_word = by_word[:, :, 0::2] | by_word[:, :, 1::2] << 4
    words = _panelled(by_word).permute(0, 1, 4, 2, 3).flatten(2)
    heads = (scales, minimums) if kind.minimums and minimums is not None else (scales,)
    numbers = [_panelled(each.to(kind.scale)).contiguous().view(torch.uint8) for each in heads]
    return Packed(torch.cat((*numbers, words), dim=2), form, num_rows, columns)


def unpack(matrix: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix as rows [N,K] of `dtype`, computed in it."""
    data, form, num_rows, columns = matrix
    panels, groups = data.shape[:2]
    if form == PANELS:
        rows = data.to(dtype).permute(0, 3, 1, 4, 2)
    else:
        kind = QUANTISED[form]
        size = PANEL_ROWS * kind.scale.itemsize
        head = size * (2 if kind.minimums else 1)
        parts = 32 // kind.bits
        numbers = data[:, :, :head].contiguous().view(kind.scale).to(dtype)
        scales = numbers[:, :, :PANEL_ROWS]
        words = data[:, :, head:].view(panels, groups, GROUP // parts, PANEL_ROWS, 4)
        if kind.bits == 4:
            words = torch.stack((words & 15, words >> 4), dim=-1).flatten(4)
        values = (words if kind.bits == 4 else words.view(torch.int8)).to(dtype) - kind.zero
        weights = values * scales[:, :, None, :, None]
        if kind.minimums:
            weights = weights + numbers[:, :, PANEL_ROWS:][:, :, None, :, None]
        rows = weights.permute(0, 3, 1, 4, 2)
    return rows.reshape(panels * PANEL_ROWS, groups * GROUP)[:num_rows, :columns]
