"""Groups of ranks over torch.distributed's backends, each made once."""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch._C import _distributed_c10d as c10d

log = logging.getLogger(__name__)

PATIENCE = datetime.timedelta(hours=1)
"""How long a collective waits for a rank that is alive: one may read its weights from a slow disk meanwhile. One that
has died ends a collective at once on a CPU; on a GPU whoever started the ranks ends the others."""

LEAVE_SECONDS = 5.0

Splits = list[int]


class Work(Protocol):
    """A collective that was begun."""

    def wait(self) -> bool:
        """On a CPU until it is done; on a GPU the current stream waits, not the host."""


class Group(Protocol):
    """What is used of a backend of torch (gloo, NCCL): collectives among the ranks of a set, in their order."""

    def rank(self) -> int: ...

    def size(self) -> int: ...

    def allreduce(self, tensors: list[torch.Tensor], options: Any, /) -> Work | None: ...

    def broadcast(self, tensors: list[torch.Tensor], options: Any, /) -> Work | None: ...

    def _allgather_base(self, whole: torch.Tensor, own: torch.Tensor, options: Any, /) -> Work | None: ...

    def gather(
        self, everyones: list[list[torch.Tensor]], own: list[torch.Tensor], options: Any, /
    ) -> Work | None: ...

    def _reduce_scatter_base(self, own: torch.Tensor, whole: torch.Tensor, options: Any, /) -> Work | None: ...

    def alltoall_base(
        self, got: torch.Tensor, given: torch.Tensor, got_rows: Splits, given_rows: Splits, options: Any, /
    ) -> Work | None: ...

    def abort(self) -> None: ...


Make = Callable[[str, Sequence[int]], Group]
"""Makes the group of these ranks, under a name that all of them know it by."""


def gloo(store: c10d.Store, rank: int, address: str) -> Make:
    """Groups on the host, over the interface of this machine that has `address`."""
    backend: Any = c10d.ProcessGroupGloo
    device = backend.create_device(hostname=address)

    def make(name: str, ranks: Sequence[int]) -> Group:
        options = backend._Options()
        options._timeout, options._devices = PATIENCE, [device]
        return cast(Group, backend(c10d.PrefixStore(name, store), ranks.index(rank), len(ranks), options))

    return make


def nccl(store: c10d.Store, rank: int) -> Make:
    """Groups of GPUs."""
    backend: Any = c10d.ProcessGroupNCCL

    def make(name: str, ranks: Sequence[int]) -> Group:
        options = backend.Options()
        options._timeout = PATIENCE
        return cast(Group, backend(c10d.PrefixStore(name, store), ranks.index(rank), len(ranks), options))

    return make


class Groups:
    """The groups that this rank is in. Every rank asks for those that it shares with others in the same order."""

    def __init__(self, make: Make) -> None:
        self._make = make
        self._made: dict[tuple[int, ...], Group] = {}

    def of(self, ranks: tuple[int, ...]) -> Group:
        """The group of these ranks, which waits for all of them the first time."""
        if ranks not in self._made:
            self._made[ranks] = self._make(f"ranks {' '.join(map(str, ranks))}", ranks)
        return self._made[ranks]

    def leave(self) -> None:
        """Give the groups up without waiting for other ranks. NCCL ends a group only when no CUDA graph uses it: where
        one is left, because a rank was lost in the midst of a step, that is not waited for longer than `LEAVE_SECONDS`.
        """
        aborting = threading.Thread(target=_abort, args=(list(self._made.values()),), daemon=True)
        aborting.start()
        aborting.join(LEAVE_SECONDS)
        if aborting.is_alive():
            log.warning("a group of ranks does not end; it ends with this process")
        self._made.clear()


def _abort(groups: Sequence[Group]) -> None:
    for group in groups:
        try:
            group.abort()
        except RuntimeError as error:  # whatever a backend has to say, nobody needs this group any more
            log.warning("a group of ranks did not end as it should: %s", error)


def finished(work: Work | None) -> None:
    """Wait for a collective as far as its device asks for that."""
    if work is not None:
        work.wait()
