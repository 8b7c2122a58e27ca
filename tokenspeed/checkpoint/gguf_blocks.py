"""The blocks of GGUF's quantised tensors, taken apart into what the packed forms of `kernels.forms` are made of.

Layouts as in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Nothing is rounded: a weight is the same
number as the `gguf` package makes of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor

from tokenspeed.kernels.forms import GROUP, Packed, pack_quantised

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


def _q4_k(raw: Tensor) -> Parts:
    """256 elements with two halves: eight groups, each with 6 bits of a scale and of a minimum in 12 bytes."""
    whole = _halves(raw[:, :4]).float()
    packed = raw[:, 4:16]
    low, high, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((low & 63, rest & 15 | low >> 6 << 4), dim=1)
    minimums = torch.cat((high & 63, rest >> 4 | high >> 6 << 4), dim=1)
    values = _nibbles(raw[:, 16:].reshape(-1, 4, GROUP)).flatten(1)
    return values, whole[:, :1] * scales, -whole[:, 1:] * minimums


FORMS: Mapping[GGMLQuantizationType, tuple[str, Callable[[Tensor], Parts]]] = {
    GGMLQuantizationType.Q4_0: ("q4_0", _q4_0),
    GGMLQuantizationType.Q4_1: ("q4_1", _q4_1),
    GGMLQuantizationType.Q8_0: ("q8_0", _q8_0),
    GGMLQuantizationType.Q4_K: ("q4_k", _q4_k),
}
"""The types that are multiplied as they are stored, with the form that they become."""

_PARTS = dict(FORMS.values())


def packed(form: str, rows: Tensor, block_bytes: int) -> Packed:
    """A matrix whose rows are blocks [N, bytes of a row], in its form."""
    num_rows = rows.shape[0]
    values, scales, minimums = _PARTS[form](rows.view(-1, block_bytes))
    minimums = None if minimums is None else minimums.reshape(num_rows, -1)
    return pack_quantised(form, values.reshape(num_rows, -1), scales.reshape(num_rows, -1), minimums)
