"""Checks at the launchers' doors: a wrong type or layout must not reach a raw pointer."""

from __future__ import annotations

import torch
from torch import Tensor


def expect(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int | None) -> None:
    """Raise `ValueError` unless the tensor has the type, the shape (None is any) and a contiguous last dimension."""
    if (
        tensor.dtype is not dtype
        or tensor.dim() != len(shape)
        or any(want is not None and size != want for size, want in zip(tensor.shape, shape, strict=True))
        or (shape[-1] != 1 and tensor.shape[-1] > 1 and tensor.stride(-1) != 1)
    ):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}; "
            f"expected {dtype} [{wanted}], the last dimension contiguous"
        )


def expect_contiguous(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int | None) -> None:
    """As `expect`, and every dimension contiguous."""
    expect(name, tensor, dtype, *shape)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} with strides {tensor.stride()} is not contiguous")
