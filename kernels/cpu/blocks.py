"""What the launchers of whole blocks share: matrices as the C++ side takes them, the stream, the rows of a step.

Pointers of weights and caches are taken once, at a block's first call: they may not move afterwards. Checks of what
changes from call to call, and nothing else, run in every layer of every step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenspeed.kernels.block_weights import CacheRows, Edge
from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.arguments import expect, expect_contiguous
from tokenspeed.kernels.forms import Matrix, Packed, form_of, packed_shape

Description = tuple[int, int, int, int, int, str]
"""A matrix: address, address of its bias or 0, rows, columns, stride of a row, form."""

Run = tuple[int, int, int, int, int, float, int, int, int, int]
"""x, its stride, residual, its stride, gain, eps, y, sum, tokens, threads: addresses, or 0 for what is not there."""


def described(name: str, matrix: Matrix, bias: Tensor | None, form: str, dtype: torch.dtype) -> Description:
    """Raises `ValueError` for a matrix that is not of the form, or whose type or layout does not fit."""
    rows, columns, stride = checked(name, matrix, form, dtype)
    if bias is not None:
        expect_contiguous(f"{name}'s bias", bias, dtype, (rows,))
    data = matrix.data if isinstance(matrix, Packed) else matrix
    return data.data_ptr(), 0 if bias is None else bias.data_ptr(), rows, columns, stride, form


def checked(name: str, matrix: Matrix, form: str, dtype: torch.dtype) -> tuple[int, int, int]:
    """Rows, columns and stride (0: packed) of a matrix of `form`."""
    if form_of(matrix) != form:
        raise ValueError(f"{name} is of the form {form_of(matrix)}; expected {form}")
    if isinstance(matrix, Packed):
        shape, kind = packed_shape(form, matrix.rows, matrix.columns, dtype)
        expect_contiguous(name, matrix.data, kind, shape)
        return matrix.rows, matrix.columns, 0
    expect(name, matrix, dtype, (matrix.shape[0], matrix.shape[1]))
    return matrix.shape[0], matrix.shape[1], matrix.stride(0)


class Entrance:
    """The edge that a block begins with."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._gain: Tensor | None = None
        self._address = 0

    def arguments(
        self, x: Tensor, edge: Edge | None, shape: tuple[int, int], y: Tensor
    ) -> tuple[Run, Tensor | None]:
        """The arguments of `run` from x to threads, and the sum that the block leaves. x is [tokens, hidden size]."""
        dtype = self._dtype
        expect("x", x, dtype, shape)
        tokens, threads = shape[0], torch.get_num_threads()
        if edge is None:
            return (x.data_ptr(), x.stride(0), 0, 0, 0, 0.0, y.data_ptr(), 0, tokens, threads), None
        gain, eps, residual = edge
        if gain is not self._gain:
            expect_contiguous("the gain", gain, dtype, shape[1:])
            self._gain, self._address = gain, gain.data_ptr()
        at = self._address
        if residual is None:
            return (x.data_ptr(), x.stride(0), 0, 0, at, eps, y.data_ptr(), 0, tokens, threads), x
        expect("residual", residual, dtype, shape)
        total = torch.empty(shape, dtype=dtype)
        return (
            x.data_ptr(), x.stride(0), residual.data_ptr(), residual.stride(0), at, eps, y.data_ptr(),
            total.data_ptr(), tokens, threads,
        ), total  # fmt: skip


_seen: tuple[CacheRows, tuple[_ops.BlockRows, int]] | None = None


def located(rows: CacheRows) -> tuple[_ops.BlockRows, int]:
    """The rows' addresses and their number. All layers of a step pass the same rows, which are looked at once."""
    global _seen  # noqa: PLW0603 - read and replaced as a whole, so it may be another thread's, never half of one
    seen = _seen
    if seen is not None and seen[0] is rows:
        return seen[1]
    num_rows = rows.kv_len.shape[0]
    expect_contiguous("positions", rows.positions, torch.int64, (num_rows,))
    expect_contiguous("kv_slots", rows.kv_slots, torch.int64, (num_rows,))
    expect_contiguous("kv_len", rows.kv_len, torch.int32, (num_rows,))
    table = rows.block_table
    expect("block_table", table, torch.int32, (num_rows, table.shape[1]))
    made = _ops.BlockRows(
        rows.positions.data_ptr(), rows.kv_slots.data_ptr(), rows.kv_len.data_ptr(), table.data_ptr(),
        table.stride(0), table.shape[1],
    )  # fmt: skip
    _seen = rows, (made, num_rows)
    return made, num_rows
