"""What every launcher of this backend asks of the device."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def dependency_wait(DEPENDENT: tl.constexpr):
    """Before this no program may read what the kernel before it in the stream wrote."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release_dependents(DEPENDENT: tl.constexpr):
    """From here on the next kernel may start; what it reads of ours it still waits for."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; without a GPU, for the interpreter, a Hopper's."""
    if device.type != "cuda":
        return 232448
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["max_shared_mem"])


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether the device has tensor-memory copies and programmatic dependent launch (sm90 and newer)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def dependent_launch(dependent: bool) -> dict[str, Any]:
    """The launch option that goes with a kernel's DEPENDENT."""
    return {"launch_pdl": True} if dependent else {}
