"""One call to compare, and the pieces that its inputs are made of."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenspeed.kernels.registry import Traits

Arguments = tuple[Any, ...]
Results = tuple[Tensor, ...]


def returned(arguments: Arguments, value: Any) -> Results:
    """What a case compares unless it says otherwise: the tensors returned."""
    return tuple(value) if isinstance(value, tuple) else (value,)


@dataclass(frozen=True)
class Case:
    """One call. `arguments` draws them on the CPU, floating ones rounded to the type given; `results` picks what to
    compare from the arguments after the call and the value returned.

    `exact`: the results are numbers of tokens and places, which have no rounding. Such a case runs in float32 alone.
    `wide`: results are in float32 whatever the type of the arguments, and as exact as that.
    `captured`: among its rows is the padding of a captured step, which kernels of the CPU never see.
    `large`: takes seconds on a CPU, and is there for what only a GPU does with many tokens.
    """

    name: str
    traits: Traits
    arguments: Callable[[torch.Generator, torch.dtype], Arguments]
    results: Callable[[Arguments, Any], Results] = returned
    exact: bool = False
    wide: bool = False
    captured: bool = False
    large: bool = False


def normal(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal numbers, rounded to `dtype`."""
    return torch.randn(shape, generator=g).to(dtype)


def weight(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """A projection [..., out, in] that keeps the size of what it multiplies."""
    return (torch.randn(shape, generator=g) / math.sqrt(shape[-1])).to(dtype)


def num_elements(value: Any) -> int:
    """Elements of all tensors among the arguments."""
    if isinstance(value, tuple):
        return sum(map(num_elements, value))
    return value.numel() if isinstance(value, Tensor) else 0


def copied(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The same arguments in fresh memory of the same layout, floating tensors in another type if asked."""
    if isinstance(value, tuple):
        parts = [copied(each, device, dtype) for each in value]
        return type(value)(*parts) if type(value) is not tuple else tuple(parts)
    if not isinstance(value, Tensor):
        return value
    kept = value.dtype if dtype is None or not value.is_floating_point() else dtype
    fresh = torch.empty_strided(value.shape, value.stride(), dtype=kept, device=device)
    fresh.copy_(value)
    return fresh


def worst_error(result: Tensor, reference: Tensor) -> float:
    """‖result − reference‖ / ‖reference‖ of the worst token; infinite where anything is not finite."""
    result, reference = (each.double().cpu().flatten(1) for each in (result, reference))
    if result.shape != reference.shape or not bool(result.isfinite().all()):
        return float("inf")
    error = (result - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-30)
    return float(error.max()) if error.numel() else 0.0


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty is NaN (integers: the largest), so that an element that nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        # Torch's side effect is wanted, not its promise: that some of its own operations cannot keep it is no matter.
        warnings.simplefilter("ignore", UserWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
