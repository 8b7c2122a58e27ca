"""Checks at the launchers' doors: a wrong type or layout must not reach a raw pointer.

They run for every op of every layer of every step, so the way through is three comparisons.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise `ValueError` unless the tensor has this type and shape and a contiguous last dimension."""
    if tensor.dtype is not dtype or tensor.shape != shape or (tensor.stride(-1) != 1 and shape[-1] > 1):
        raise ValueError(f"{_described(name, tensor)}; expected {dtype} {shape}, the last dimension contiguous")


def expect_contiguous(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As `expect`, and every dimension contiguous."""
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(f"{_described(name, tensor)}; expected {dtype} {shape}, contiguous")


def _described(name: str, tensor: Tensor) -> str:
    return f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
