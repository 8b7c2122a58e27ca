"""How a weight matrix can lie in memory: as rows, or packed as the kernels that multiply it read it.

A packed matrix is panels of 16 rows, the last one padded with zeros; a panel is groups of 32 columns; a group is the
rows' scales, then their minimums, then their values, in 32-bit words of which neighbouring rows have neighbouring ones.
A weight is value · scale + minimum. Of values of five or six bits the upper ones are in words behind those of the lower
four. `kernels/cpu/forms.h` has the same layout in C++.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

PANEL_ROWS = 16
GROUP = 32
PART_ROWS = 64 * PANEL_ROWS
"""Rows that are packed at a time."""

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
    """Values of `bits` bits with a scale for 32 of a row, or `spans` of them for as many equal parts of those, and
    minimums or what stands for zero: values are unsigned with a zero, or with minimums; signed without either."""

    bits: int
    scale: torch.dtype
    minimums: bool
    zero: int = 0
    spans: int = 1

    @property
    def numbers(self) -> int:
        """Scales and minimums of a row of a group."""
        return self.spans * (2 if self.minimums else 1)

    @property
    def words(self) -> int:
        """Words of 32 bits that hold the values of a row of a group."""
        return GROUP * self.bits // 32

    @property
    def group_bytes(self) -> int:
        """Bytes of a group of a panel."""
        return PANEL_ROWS * (self.scale.itemsize * self.numbers + 4 * self.words)


QUANTISED: Mapping[str, Quantised] = {
    "q4_0": Quantised(4, torch.float16, False, zero=8),
    "q4_1": Quantised(4, torch.float16, True),
    "q4_k": Quantised(4, torch.float32, True),
    "q8_0": Quantised(8, torch.float16, False),
    "q5_0": Quantised(5, torch.float16, False, zero=16),
    "q5_1": Quantised(5, torch.float16, True),
    "q5_k": Quantised(5, torch.float32, True),
    "q6_k": Quantised(6, torch.float32, False, zero=32, spans=2),
    "mixed": Quantised(6, torch.float32, True, spans=2),
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


def pack_into(data: Tensor, rows: Tensor) -> None:
    """Fill the data of panels with a matrix [N,K], part by part: a copy of all of it would be memory twice."""
    for first in range(0, rows.shape[0], PART_ROWS):
        part = pack(rows[first : first + PART_ROWS]).data
        data[first // PANEL_ROWS : first // PANEL_ROWS + part.shape[0]] = part


def common_form(forms: Collection[str]) -> str:
    """The form that holds rows of all of these: theirs if it is one, what holds any of up to six bits, or rows."""
    if len(forms) == 1:
        return next(iter(forms))
    few = (form in QUANTISED and QUANTISED[form].bits <= QUANTISED["mixed"].bits for form in forms)
    return "mixed" if forms and all(few) else ROWS


class Rows(NamedTuple):
    """Rows of a matrix in a quantised form, taken apart: values [N,K] uint8 (8 bits: int8), scales and minimums [N, K /
    columns that share one]. K is whole groups."""

    form: str
    values: Tensor
    scales: Tensor
    minimums: Tensor | None = None

    def window(self, first: int, last: int, columns: slice) -> Rows:
        """The rows [first, last), of them these columns, which are whole groups."""
        shared = self.values.shape[1] // self.scales.shape[1]
        few = slice(columns.start // shared, columns.stop // shared)
        minimums = None if self.minimums is None else self.minimums[first:last, few]
        return Rows(self.form, self.values[first:last, columns], self.scales[first:last, few], minimums)

    def as_mixed(self) -> Rows:
        """The same weights in the form that holds them beside others."""
        kind, repeats = QUANTISED[self.form], QUANTISED["mixed"].spans // QUANTISED[self.form].spans
        scales = self.scales.float().repeat_interleave(repeats, 1)
        if self.minimums is None:
            return Rows("mixed", self.values, scales, scales * -kind.zero)
        return Rows("mixed", self.values, scales, self.minimums.float().repeat_interleave(repeats, 1))


def rounded(rows: Tensor) -> Rows:
    """Rows [N,K] of floating numbers in 8 bits, to the nearest; columns are padded with zeros to whole groups.

    The largest number of a group becomes ±127 or a little less, since its scale is rounded up to half precision.
    Numbers that are not finite, or above 8e6, give scales that are not finite.
    """
    num_rows, columns = rows.shape
    padded = torch.nn.functional.pad(rows.float(), (0, -columns % GROUP)).view(num_rows, -1, GROUP)
    exact = padded.abs().amax(2) / 127
    scales = exact.half()
    low = scales.float() < exact
    scales[low] = (scales[low].view(torch.int16) + 1).view(torch.float16)
    values = padded / scales.float().clamp_min(2.0**-24).unsqueeze(2)
    return Rows("q8_0", values.round_().to(torch.int8).view(num_rows, -1), scales)


def pack_quantised(rows: Rows) -> Packed:
    """Rows [N,K] → the matrix in their form. Scales and minimums must be numbers that its type holds."""
    num_rows, columns = rows.values.shape
    shape, dtype = packed_shape(rows.form, num_rows, columns, torch.float32)
    packed = Packed(torch.zeros(shape, dtype=dtype), rows.form, num_rows, columns)
    put_rows(packed.data, 0, rows)
    return packed


def put_rows(data: Tensor, first: int, rows: Rows) -> None:
    """Overwrite the rows from `first` on of a packed matrix of the same form."""
    kind = QUANTISED[rows.form]
    count = rows.values.shape[0]
    heads = [part.reshape(count, -1, kind.spans) for part in (rows.scales, rows.minimums) if part is not None]
    numbers, words = _by_row(data, kind)
    at = torch.arange(first, first + count, device=data.device)
    panel, lane = at // PANEL_ROWS, at % PANEL_ROWS
    numbers[panel, lane] = torch.cat(heads, dim=2).to(kind.scale)
    words[panel, lane] = _words(kind, rows.values.contiguous())


def _by_row(data: Tensor, kind: Quantised) -> tuple[Tensor, Tensor]:
    """Views of packed data: the numbers [panels, PANEL_ROWS, groups, n] and words [panels, PANEL_ROWS, groups, w] of
    each row."""
    end = kind.numbers * PANEL_ROWS
    numbers = data.view(kind.scale)[..., :end].view(*data.shape[:2], kind.numbers, PANEL_ROWS)
    words = data.view(torch.int32)[..., -kind.words * PANEL_ROWS :].view(*data.shape[:2], kind.words, PANEL_ROWS)
    return numbers.permute(0, 3, 1, 2), words.permute(0, 3, 1, 2)


def _words(kind: Quantised, values: Tensor) -> Tensor:
    """Values [N,K] → their words [N, groups, w]."""
    count = values.shape[0]
    if kind.bits == 8:
        by_byte = values.view(torch.uint8).view(count, -1, 4, GROUP // 4)
        return by_byte.transpose(2, 3).contiguous().view(torch.int32).squeeze(3)
    # Four neighbours at a time, which go to the same place of neighbouring words.
    fours = values.view(torch.int32).view(count, -1, GROUP // 4)
    lower = fours & 0x0F0F0F0F
    planes = [_two_parts(lower).view(torch.uint8).view(count, -1, 4, 4)]
    if kind.bits > 4:
        bits = kind.bits - 4
        for word in range(0, 4, 4 // bits):
            upper = (((fours >> 8 * (word + i) + 4) & (1 << bits) - 1) << bits * i for i in range(4 // bits))
            planes.append(_two_parts(reduce(torch.bitwise_or, upper)).to(torch.uint8).unsqueeze(3))
    return torch.cat(planes, dim=3).transpose(2, 3).contiguous().view(torch.int32).squeeze(3)


def _two_parts(nibbles: Tensor) -> Tensor:
    """The even parts of a group [N, groups, 8] in the lower nibbles of bytes, the odd ones in the upper."""
    return nibbles[..., 0::2] | nibbles[..., 1::2] << 4


def _values(kind: Quantised, words: Tensor) -> Tensor:
    """Words [panels, PANEL_ROWS, groups, w] → values [panels, PANEL_ROWS, groups, GROUP]."""
    by_byte = words.contiguous().view(torch.uint8).view(*words.shape, 4).transpose(3, 4)
    if kind.bits == 8:
        return by_byte.flatten(3).view(torch.int8)
    lower = by_byte[..., :4]
    values = torch.stack((lower & 15, lower >> 4), dim=4)
    if kind.bits > 4:
        bits = kind.bits - 4
        places = torch.tensor([[[half + i for i in range(0, 4, bits)]] for half in (0, 4)], dtype=torch.uint8)
        upper = by_byte[..., 4:].unsqueeze(4).unsqueeze(6) >> places & (1 << bits) - 1
        values = values | upper.flatten(5) << 4
    return values.flatten(3)


def unpack(matrix: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix as rows [N,K] of `dtype`, computed in it."""
    data, form, num_rows, columns = matrix
    panels, groups = data.shape[:2]
    if form == PANELS:
        rows = data.to(dtype).permute(0, 3, 1, 4, 2)
    else:
        kind = QUANTISED[form]
        numbers, words = _by_row(data, kind)
        numbers = numbers.to(dtype).unsqueeze(4)
        values = _values(kind, words).view(*words.shape[:3], kind.spans, -1)
        rows = (values.to(dtype) - kind.zero) * numbers[..., : kind.spans, :]
        if kind.minimums:
            rows = rows + numbers[..., kind.spans :, :]
    return rows.reshape(panels * PANEL_ROWS, groups * GROUP)[:num_rows, :columns]
