"""GPU memory that ranks of one machine read and write directly, over torch's symmetric memory.

Its multicast operations are never used: of two to eight ranks a kernel that reads its peers' memory is as fast for the
messages of a decode step, and multicast asks more of a machine than that ranks can reach each other.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch._C import _distributed_c10d as c10d

from tokenspeed.kernels import ops
from tokenspeed.kernels.peers import words_shape
from tokenspeed.parallel.cost import SHARED_BYTES

log = logging.getLogger(__name__)

BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Names the running machine."""

_names = itertools.count()


class SymmetricMemory:
    """Makes memory that this rank on `device` has in common with sets of others. All ranks of a set ask together."""

    def __init__(self, store: c10d.Store, rank: int, device: torch.device) -> None:
        self._store, self._rank, self._device = store, rank, device
        self._made: dict[tuple[tuple[int, ...], int, torch.dtype], tuple[ops.Peers, Any] | None] = {}

    def peers(self, ranks: tuple[int, ...], hidden: int, dtype: torch.dtype) -> ops.Peers | None:
        """For messages of rows of `hidden` numbers among `ranks`, at most `SHARED_BYTES`. It takes four times as
        much, and 256 KiB for each rank; None where these GPUs cannot reach each other's memory."""
        key = ranks, hidden, dtype
        if key not in self._made:
            self._made[key] = self._make(ranks, hidden, dtype)
        made = self._made[key]
        return None if made is None else made[0]

    def leave(self) -> None:
        """Give the memory back."""
        self._made.clear()

    def _make(self, ranks: tuple[int, ...], hidden: int, dtype: torch.dtype) -> tuple[ops.Peers, Any] | None:
        name = f"symmetric {' '.join(map(str, ranks))} of {hidden} {dtype}"
        own = f"{BOOT.read_text().strip()} {self._device.index}" if BOOT.exists() else ""
        places = self._told(f"{name}/place", ranks, own)
        if not all(self._told(f"{name}/reached", ranks, "yes" if self._reaches(own, places) else "")):
            return None
        made = self._rendezvous(name, ranks, hidden, dtype)
        if not all(self._told(f"{name}/made", ranks, "" if made is None else "yes")):
            return None
        return made

    def _told(self, key: str, ranks: tuple[int, ...], value: str) -> list[str]:
        """What each of these ranks says under this key."""
        self._store.set(f"{key}/{self._rank}", value)
        return [self._store.get(f"{key}/{other}").decode() for other in ranks]

    def _reaches(self, own: str, places: list[str]) -> bool:
        machine = own.partition(" ")[0]
        if not machine or any(place.partition(" ")[0] != machine for place in places):
            return False
        others = [int(place.partition(" ")[2]) for place in places if place != own]
        if len(others) != len(places) - 1 or max(others) >= torch.cuda.device_count():
            return False
        return all(torch.cuda.can_device_access_peer(self._device, other) for other in others)

    def _rendezvous(
        self, name: str, ranks: tuple[int, ...], hidden: int, dtype: torch.dtype
    ) -> tuple[ops.Peers, Any] | None:
        # Read by torch when ranks meet; it would otherwise create multicast objects that nobody here uses.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        place, size = ranks.index(self._rank), len(ranks)
        rows = max(1, SHARED_BYTES // (hidden * dtype.itemsize))
        parts = {
            "terms": ((2, rows, hidden), dtype),
            "sums": ((2, rows, hidden), dtype),
            "arrived": ((rows, size), torch.int32),
            "summed": ((rows,), torch.int32),
            "words": (words_shape(size, hidden, dtype.itemsize), torch.int64),
        }
        starts = list(itertools.accumulate((_aligned(*part) for part in parts.values()), initial=0))
        memory: Any = c10d._SymmetricMemory
        try:
            buffer = memory.empty_strided_p2p((starts[-1],), (1,), torch.uint8, self._device)
            buffer.zero_()
            torch.cuda.synchronize(self._device)  # before any other rank counts here
            known, group = self._group(name, place, size)
            handle = memory.rendezvous(buffer, known)
        except RuntimeError as error:  # torch's word for every reason why a driver does not share memory
            log.warning("ranks %s reach each other, but share no memory; NCCL instead: %s", ranks, error)
            return None
        views = {
            field: tuple(handle.get_buffer(other, shape, kind, start // kind.itemsize) for other in range(size))
            for (field, (shape, kind)), start in zip(parts.items(), starts, strict=False)
        }
        calls = torch.zeros(3, rows, dtype=torch.int32, device=self._device)
        return ops.Peers(rank=place, calls=calls, **views), (handle, group)

    def _group(self, name: str, place: int, size: int) -> tuple[str, Any]:
        """A name under which torch finds these ranks and a store of theirs, as long as the group lives that is
        returned beside it."""
        known = f"tokenspeed {next(_names)}"
        store = c10d.PrefixStore(name, self._store)
        group: Any = c10d.ProcessGroup(store, place, size)
        group._set_group_name(known)
        registry: Any = c10d
        registry._register_process_group(known, group)
        registry._SymmetricMemory.set_group_info(known, place, size, store)
        return known, group


def _aligned(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes that a part takes, so that the next begins at a multiple of 256."""
    return -(-math.prod(shape) * dtype.itemsize // 256) * 256
