"""One rank of many by itself: it computes its share, and what other ranks would send is made up.

What comes out means nothing. How long it takes is what a rank computes between its collectives, on one device, for
layouts of more ranks than there are devices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

from tokenspeed.errors import ConfigError, InvariantBroken
from tokenspeed.kernels import ops
from tokenspeed.parallel.collectives import Collectives, Exchange, Move, ReducedNorm
from tokenspeed.parallel.groups import Group, Groups
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.steps import (
    AllGather,
    AllReduce,
    AllToAll,
    GatherFeatures,
    ReduceScatter,
    Slice,
    Transfer,
)

T = TypeVar("T")

Shape = tuple[int, ...]


class LeftOut(Collectives):
    """Collectives that send nothing and launch nothing: results have the shapes that they would have, a sum is this
    rank's term, and what others would have given are random numbers, the same at each call. A norm behind a sum is the
    norm alone."""

    def __init__(self, mesh: Mesh, rank: int) -> None:
        super().__init__(mesh, rank, Groups(_nobody))

    def move(self, transfer: Transfer) -> Move:
        """As `Collectives.move`."""
        ranks = self._ranks(transfer.first, transfer.stop)
        return MOVES[type(transfer)](len(ranks), ranks.index(self._rank))

    def all_reduce_norm(self, first: int, stop: int, target: ops.Target, hidden: int) -> ReducedNorm:
        """The norm of this rank's term."""
        return ops.rms_norm(target)

    def exchange(self, first: int, stop: int) -> Exchange:
        """What goes where depends on tokens: captured steps, which alone are measured so, have none."""
        raise InvariantBroken("tokens are dispatched to experts of other ranks, and there are no other ranks")


class Alone:
    """Rank `rank` of `mesh` on `device`, and nobody else: what a model over ranks needs of a `World`."""

    def __init__(self, mesh: Mesh, rank: int, device: torch.device) -> None:
        self.mesh, self.rank, self.device = mesh, rank, device
        self.collectives: Collectives = LeftOut(mesh, rank)

    def least(self, number: int) -> int:
        """Of all ranks that there are."""
        return number


def run_alone(mesh: Mesh, kind: str, job: Callable[..., Iterator[T]], *arguments: object) -> Iterator[T]:
    """What `job(world, *arguments)` yields on rank 0 of `mesh` by itself, in this process, on the first device of that
    kind. Raises `ConfigError` where there is no GPU, or something does not fit into its memory."""
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--alone needs a GPU, or --device cpu")
    device = torch.device(kind, 0) if kind == "cuda" else torch.device(kind)
    try:
        with torch.inference_mode():
            yield from job(Alone(mesh, 0, device), *arguments)
    except torch.OutOfMemoryError as error:
        raise ConfigError(" ".join(str(error).split())) from error


def _nobody(name: str, ranks: object) -> Group:
    raise InvariantBroken(f"{name}: a rank by itself is in no group")


def _made_up(shape_of: Callable[[Shape], Shape]) -> Move:
    """A tensor of another shape, made at the first call with each and each type. Random, so that the tokens of others
    ask experts of their own; whole numbers, which are ids and flags, are this rank's own over again."""
    made: dict[tuple[Shape, torch.dtype], torch.Tensor] = {}

    def move(x: torch.Tensor) -> torch.Tensor:
        shape = shape_of(tuple(x.shape))
        key = shape, x.dtype
        if key not in made:
            if x.is_floating_point():
                generator = torch.Generator(x.device).manual_seed(math.prod(shape))
                made[key] = torch.randn(shape, generator=generator, device=x.device).to(x.dtype)
            else:
                own = x[: shape[0]]
                made[key] = own.repeat(*(wanted // had for wanted, had in zip(shape, own.shape, strict=True)))
        return made[key]

    return move


def _own_rows(size: int, place: int) -> Move:
    def move(x: torch.Tensor) -> torch.Tensor:
        rows = len(x) // size
        return x[place * rows : (place + 1) * rows]

    return move


MOVES: Mapping[type[Transfer], Callable[[int, int], Move]] = {
    AllReduce: lambda size, place: lambda x: x,
    ReduceScatter: _own_rows,
    Slice: _own_rows,
    AllGather: lambda size, place: _made_up(lambda shape: (shape[0] * size, *shape[1:])),
    GatherFeatures: lambda size, place: _made_up(lambda shape: (shape[0], shape[1] * size)),
    AllToAll: lambda size, place: _made_up(lambda shape: (shape[0] // size, shape[1] * size)),
}
