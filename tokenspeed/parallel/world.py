"""This process among the ranks of one model.

Ranks are processes that whoever started them told their number and where rank 0 listens. What they agree upon on the
host goes over gloo; what lies on the device over NCCL where that is a GPU. Groups are made here, without torch's
process-wide registry of them: a world is a value, and a process can leave one and join another.
"""

from __future__ import annotations

import datetime
import errno
import ipaddress
import socket
import time
from collections.abc import Iterable, Sequence
from typing import Protocol, Self

import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed import DistError

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.collectives import Collectives, share
from tokenspeed.parallel.groups import PATIENCE, Group, Groups, finished, gloo, nccl
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.symmetric import SymmetricMemory
from tokenspeed.parallel.wire import Wire


class Member(Protocol):
    """One rank of `mesh`, on `device`, as a model sees it: a `World`, or a rank by itself (`parallel/alone.py`)."""

    mesh: Mesh
    rank: int
    device: torch.device
    collectives: Collectives

    def least(self, number: int) -> int:
        """The least of what all ranks give."""


class World:
    """One rank of `mesh`, on `device`. `collectives` are what a program's transfers are made of.

    `least`, `same`, `told` and everything on the device is done by all ranks, in the same order, and what is done on
    the host from one thread at a time.
    """

    def __init__(
        self,
        mesh: Mesh,
        rank: int,
        device: torch.device,
        *,
        host: Group,
        wire: Wire,
        groups: Groups,
        symmetric: SymmetricMemory | None,
    ) -> None:
        """As `join` makes it."""
        self.mesh, self.rank, self.device = mesh, rank, device
        self.collectives = Collectives(mesh, rank, groups, symmetric)
        # The ranks of a group are neighbours: that each has its own tokens is the outermost of attention's axes.
        self._group_size = mesh.world // mesh.size("attn_data")
        self._host, self._wire, self._groups, self._symmetric = host, wire, groups, symmetric
        self._left = False

    @classmethod
    def join(
        cls, mesh: Mesh, rank: int, device: torch.device, *, address: str, port: int, timeout: float,
        standing: str | None = None,
    ) -> Self:  # fmt: skip
        """Meet the other ranks of `mesh` at `address` and `port`, where rank 0 listens, at most `timeout` seconds.

        `standing` is the prefix of a store that the launcher holds there; without one rank 0 makes the store.
        Where `address` is this machine's loopback, so is everything else. Raises `ConfigError` in a line: the port is
        in use, ranks are missing, or they were started for different layouts.
        """
        until = time.monotonic() + timeout
        store = _meet(mesh.world, rank, address, port, until, timeout, standing)
        try:
            wire = Wire.connect(store, rank, mesh.world, address, max(1.0, until - time.monotonic()))
        except (OSError, DistError) as error:
            raise ConfigError(f"rank {rank} lost the others while it met them at {address}:{port}: {error}") from error
        store.set_timeout(PATIENCE)
        on_host = gloo(store, rank, _address_here(address, port))
        gpu = device.type == "cuda"
        world = cls(
            mesh,
            rank,
            device,
            host=on_host("host", range(mesh.world)),
            wire=wire,
            groups=Groups(nccl(store, rank) if gpu else on_host),
            symmetric=SymmetricMemory(store, rank, device) if gpu and torch.version.hip is None else None,
        )
        world.same("the layout of ranks", str(mesh))
        return world

    @property
    def num_groups(self) -> int:
        """Groups of ranks that attend together, each to rows of its own."""
        return self.mesh.size("attn_data")

    @property
    def group(self) -> int:
        """Which of them this rank is in."""
        return self.mesh.coordinate(self.rank, "attn_data")

    @property
    def decides(self) -> bool:
        """Whether this rank decides the tokens of its group."""
        return self.rank % self._group_size == 0

    def least(self, number: int) -> int:
        """The least of what all ranks give."""
        return min(self.least_by_group(number))

    def least_by_group(self, number: int) -> tuple[int, ...]:
        """The least of what the ranks of each group give."""
        given = self._gathered(torch.tensor([number], dtype=torch.int64))
        return tuple(given.view(self.num_groups, -1).amin(1).tolist())

    def same(self, name: str, value: str) -> None:
        """Raises `ConfigError` on every rank, naming the first two that differ, unless all ranks give the same `value`
        for what is called `name`."""
        values = [given.decode() for given in self._everyones(value.encode())]
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ConfigError(f"{name} differs between ranks: rank 0 has {values[0]}, rank {rank} has {other}")

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        """On the device: tokens [S] of this rank's group, which get what its first rank has, in place → those of all
        groups [G, S]. It can be part of a CUDA graph."""
        return share(self._groups.of(tuple(range(self.mesh.world))), tokens, self.num_groups)

    def told(self, data: bytes) -> list[bytes]:
        """On the host: what the first rank of each group gives, to rank 0; the others get nothing."""
        own, sizes = self._padded(data if self.decides else b"")
        rows = [torch.empty_like(own) for _ in sizes] if self.rank == 0 else []
        finished(self._host.gather([rows] if rows else [], [own], c10d.GatherOptions()))
        return _cut(rows, sizes)[:: self._group_size]

    def send(self, data: bytes) -> None:
        """Rank 0 alone, from a thread of its own: to every other rank, in order. Raises `EOFError` naming a rank that
        is gone."""
        self._wire.send(data)

    def receive(self) -> bytes:
        """Every other rank, from a thread of its own: what rank 0 sent next, however long that takes. Raises `EOFError`
        when rank 0 has left or is dead, or this rank leaves."""
        return self._wire.receive()

    def leave(self) -> None:
        """End the connections; never waits for other ranks, and whoever waits for this one learns it. Idempotent."""
        if not self._left:
            self._left = True
            self._wire.close()
            self._groups.leave()
            if self._symmetric is not None:
                self._symmetric.leave()

    def _everyones(self, own: bytes) -> list[bytes]:
        """What each rank gives."""
        padded, sizes = self._padded(own)
        return _cut(self._gathered(padded), sizes)

    def _padded(self, own: bytes) -> tuple[torch.Tensor, list[int]]:
        """Of the length of what the rank gives that gives most, and the lengths of all."""
        sizes: list[int] = self._gathered(torch.tensor([len(own)], dtype=torch.int64)).flatten().tolist()
        padded = torch.zeros(max(1, *sizes), dtype=torch.uint8)
        padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8) if own else padded[:0]
        return padded, sizes

    def _gathered(self, own: torch.Tensor) -> torch.Tensor:
        """[n] of every rank, below each other."""
        rows = own.new_empty((self.mesh.world, len(own)))
        finished(self._host._allgather_base(rows.view(-1), own, c10d.AllgatherOptions()))
        return rows


def _cut(rows: Iterable[torch.Tensor], sizes: Sequence[int]) -> list[bytes]:
    """As many bytes of each row as its size says; nothing of no rows."""
    return [row[:size].numpy().tobytes() for row, size in zip(rows, sizes, strict=False)]


def _meet(
    world: int, rank: int, address: str, port: int, until: float, timeout: float, standing: str | None
) -> c10d.Store:
    """The store of this world, once all ranks have come."""
    makes = rank == 0 and standing is None
    listening = _listen(address, port) if makes else None
    wait = datetime.timedelta(seconds=timeout)
    try:
        store: c10d.Store = c10d.TCPStore(
            address, port, world, makes, wait, wait_for_workers=False,
            master_listen_fd=None if listening is None else listening.detach(),
        )  # fmt: skip
    except DistError as error:
        raise ConfigError(f"rank {rank} found no rank 0 at {address}:{port} within {timeout:g} s") from error
    if standing is not None:
        store = c10d.PrefixStore(standing, store)
    store.set(f"here/{rank}", "")
    names = [f"here/{other}" for other in range(world)]
    try:
        store.wait(names, datetime.timedelta(seconds=max(0.1, until - time.monotonic())))
    except DistError as error:
        missing = _missing(store, names)
        raise ConfigError(
            f"rank{'s' * (len(missing) > 1)} {', '.join(missing)} did not come to {address}:{port} within {timeout:g} s"
        ) from error
    return store


def _missing(store: c10d.Store, names: Sequence[str]) -> list[str]:
    try:
        return [str(rank) for rank, name in enumerate(names) if not store.check([name])]
    except DistError:  # whoever holds the store has given up first
        return ["0"]


def _listen(address: str, port: int) -> socket.socket:
    """Where rank 0 is found: at this address alone, not at all of the machine's, as torch would by itself."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=512)
    except OSError as error:
        said = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be listened at: {error.strerror or error}"
        raise ConfigError(f"rank 0: port {port} of {address} {said}") from error


def _address_here(address: str, port: int) -> str:
    """The address of this machine at which other ranks reach it: loopback where that is where rank 0 is, else of the
    interface towards rank 0."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
            probe.connect(found[4])
            return str(ipaddress.ip_address(probe.getsockname()[0]))
    except OSError as error:
        raise ConfigError(f"{address}:{port} cannot be reached: {error.strerror or error}") from error
