"""The blocks of GGUF's quantised tensors, taken apart into what the packed forms of `kernels.forms` are made of.

Layouts as in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Nothing is rounded: a weight is the same
number as the `gguf` package makes of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from tokenspeed.kernels.forms import GROUP, Rows

Parts = tuple[Tensor, Tensor, Tensor | None]
"""Values [blocks, elements], scales and minimums [blocks, groups]."""


def _halves(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16)


def _nibbles(raw: Tensor) -> Tensor:
    """[…, n] bytes → [… 2n] values, the lower nibbles of a group before its upper ones."""
    return torch.cat((raw & 15, raw >> 4), dim=-1)


def _q4_0(raw: Tensor) -> Parts:
    return _nibbles(raw[:, 2:]), _halves(raw[:, :2]), None


def _q4_1(raw: Tensor) -> Parts:
    return _nibbles(raw[:, 4:]), _halves(raw[:, :2]), _halves(raw[:, 2:4])


def _q8_0(raw: Tensor) -> Parts:
    return raw[:, 2:].contiguous().view(torch.int8), _halves(raw[:, :2]), None


def _five_bits(lower: Tensor, upper: Tensor) -> Tensor:
    """Nibbles [blocks, 16 bytes], and the fifth bits of 32 elements in their order [blocks, 4 bytes]."""
    fifth = (upper.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)
    return _nibbles(lower) | fifth << 4


def _q5_0(raw: Tensor) -> Parts:
    return _five_bits(raw[:, 6:], raw[:, 2:6]), _halves(raw[:, :2]), None


def _q5_1(raw: Tensor) -> Parts:
    return _five_bits(raw[:, 8:], raw[:, 4:8]), _halves(raw[:, :2]), _halves(raw[:, 2:4])


def _scales_of_k(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Of 256 elements, in 16 bytes: two halves that scale eight scales and eight minimums of six bits."""
    whole = _halves(raw[:, :4]).float()
    packed = raw[:, 4:16]
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((low & 63, rest & 15 | low >> 6 << 4), dim=1)
    minimums = torch.cat((high & 63, rest >> 4 | high >> 6 << 4), dim=1)
    return whole[:, :1] * scales, -whole[:, 1:] * minimums


def _q4_k(raw: Tensor) -> Parts:
    return _nibbles(raw[:, 16:].reshape(-1, 4, GROUP)).flatten(1), *_scales_of_k(raw)


def _q5_k(raw: Tensor) -> Parts:
    """As Q4_K, with 32 bytes of fifth bits: bit g of byte i is of element i of group g."""
    fifth = raw[:, 16:48].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8).unsqueeze(1) & 1
    lower = _nibbles(raw[:, 48:].reshape(-1, 4, GROUP)).flatten(1)
    return lower | fifth.flatten(1) << 4, *_scales_of_k(raw)


def _q6_k(raw: Tensor) -> Parts:
    """256 elements: two halves of four groups, whose lower four bits are two groups of nibbles' lower ones and their
    upper ones, and whose upper two bits share 32 bytes; 16 scales; a half that scales them."""
    lower, upper = raw[:, :128].reshape(-1, 2, 1, 2 * GROUP), raw[:, 128:192].reshape(-1, 2, 1, GROUP)
    pairs = torch.cat((lower & 15, lower >> 4), dim=2).view(-1, 2, 4, GROUP)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(1)
    scales = _halves(raw[:, 208:]).float() * raw[:, 192:208].contiguous().view(torch.int8)
    return (pairs | (upper >> shifts & 3) << 4).flatten(1), scales, None


FORMS: Mapping[GGMLQuantizationType, tuple[str, Callable[[Tensor], Parts]]] = {
    GGMLQuantizationType.Q4_0: ("q4_0", _q4_0),
    GGMLQuantizationType.Q4_1: ("q4_1", _q4_1),
    GGMLQuantizationType.Q5_0: ("q5_0", _q5_0),
    GGMLQuantizationType.Q5_1: ("q5_1", _q5_1),
    GGMLQuantizationType.Q8_0: ("q8_0", _q8_0),
    GGMLQuantizationType.Q4_K: ("q4_k", _q4_k),
    GGMLQuantizationType.Q5_K: ("q5_k", _q5_k),
    GGMLQuantizationType.Q6_K: ("q6_k", _q6_k),
}
"""The types that are multiplied as they are stored, with the form that they become."""


def taken_apart(kind: GGMLQuantizationType, rows: Tensor) -> Rows:
    """Rows of blocks of a type of `FORMS` [N, bytes of a row] uint8."""
    num_rows = rows.shape[0]
    form, take_apart = FORMS[kind]
    values, scales, minimums = take_apart(rows.reshape(-1, GGML_QUANT_SIZES[kind][1]))
    by_row = None if minimums is None else minimums.reshape(num_rows, -1)
    return Rows(form, values.reshape(num_rows, -1), scales.reshape(num_rows, -1), by_row)
