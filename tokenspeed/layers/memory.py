"""Where the parameters of a model lie."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

HUGE_PAGE = 2 << 20
PIECE = 64 << 20
"""Bytes that are asked of the system at a time, unless a parameter alone has a quarter of them or more. What is not
used of them is never written, so it takes no memory."""
LINE = 64
_HUGE = getattr(mmap, "MADV_HUGEPAGE", None)


class ParameterMemory:
    """Parameters on one device, for as long as any of them lives.

    On a CPU they lie one behind the other in pieces for which the system is asked for pages of 2 MiB: a core of a Zen 4
    under a hypervisor reads 30 GB/s through them and 23 through pages of 4 KiB, and a stream of 4-bit weights makes 260
    tokens a second instead of 215. Where the system has none to give, the same tensors lie in small pages.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._piece = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, *, zeros: bool) -> torch.Tensor:
        """A contiguous tensor, of zeros or uninitialised; on a CPU it starts at a cache line. Raises `RuntimeError` or
        `OSError` when there is no memory."""
        size = math.prod(shape) * dtype.itemsize
        if self._device.type != "cpu" or _HUGE is None or size == 0:
            return (torch.zeros if zeros else torch.empty)(shape, dtype=dtype, device=self._device)
        if size >= PIECE // 4:
            return _new_piece(size, _HUGE)[:size].view(dtype).view(shape)
        if size > len(self._piece) - self._used:
            self._piece, self._used = _new_piece(PIECE, _HUGE), 0
        values = self._piece[self._used : self._used + size]
        self._used += -(-size // LINE) * LINE
        return values.view(dtype).view(shape)


def _new_piece(size: int, advice: int) -> torch.Tensor:
    """So many bytes or a few more, zero, from the start of a huge page on."""
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    pages = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages
        pages.madvise(advice)
    values = torch.frombuffer(pages, dtype=torch.uint8)
    start = -values.data_ptr() % HUGE_PAGE
    return values[start : start + size]
