"""What of each checkpoint tensor one rank needs: from the whole declaration of a parameter to a rank's own.

A parameter is filled by pieces of checkpoint tensors. `Shard(axis, dim)` cuts the parameter's dimension `dim`: where
a piece is one index of it (an expert), the indices are dealt in equal runs; where pieces are runs of it (the rows of
q, k and v), each run is cut by itself, so that every rank has its share of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.mesh import FLAGS, Mesh
from tokenspeed.parallel.placement import AnyTokens, Partial, Replicate, Shard

Share = Replicate | Shard | Partial | AnyTokens
"""How a weight lies over the ranks; `AnyTokens` is the weight of what works on each token: on every rank."""

Shape = tuple[int, ...]

T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor and what it fills: `parameter[at]` becomes `tensor[part]`, by default the whole tensor.

    Several pieces may take parts of one tensor; of a whole parameter, together they take all of it, from its first
    element on. `shared_by` neighbouring ranks hold the same part where the parameter is cut (KV heads that are fewer
    than ranks).
    """

    source: str
    at: tuple[slice | int, ...]
    part: tuple[slice, ...] = ()
    shared_by: int = 1


def filled_shape(shape: Shape, piece: Piece) -> Shape:
    """The shape of `parameter[piece.at]`."""
    at = _every_dim(piece.at, len(shape))
    return tuple(len(range(*cut.indices(size))) for cut, size in zip(at, shape, strict=True) if isinstance(cut, slice))


def tensor_shape(fills: Iterable[tuple[Shape, Piece]]) -> Shape:
    """The shape that a checkpoint tensor must have to fill these pieces of whole parameters, given with the shapes of
    the parameters: where the furthest part of it ends."""
    ends = []
    for shape, piece in fills:
        filled = filled_shape(shape, piece)
        ends.append([cut.stop for cut in _parts(piece, filled)])
    return tuple(max(sizes) for sizes in zip(*ends, strict=True))


def local(
    shape: Shape, pieces: Sequence[Piece], shares: Iterable[Share], mesh: Mesh, rank: int
) -> tuple[Shape, tuple[Piece, ...]]:
    """The shape of a parameter on `rank`, and the pieces that fill it there; no pieces: it stays zero.

    Raises `ConfigError` naming the tensor and the flag for a dimension that cannot be cut.
    """
    kept = tuple(pieces)
    for share in shares:
        if isinstance(share, Partial) and mesh.coordinate(rank, share.axis):
            kept = ()
        elif isinstance(share, Shard) and mesh.size(share.axis) > 1:
            shape, kept = _cut(shape, kept, share, mesh, rank)
    return shape, kept


def _cut(shape: Shape, pieces: Sequence[Piece], share: Shard, mesh: Mesh, rank: int) -> tuple[Shape, tuple[Piece, ...]]:
    ranks, here, dim = mesh.size(share.axis), mesh.coordinate(rank, share.axis), share.dim
    placed = [(piece, _every_dim(piece.at, len(shape))) for piece in pieces]
    if any(isinstance(at[dim], int) for _, at in placed):
        size = _equal(shape[dim], ranks, share.axis, pieces[0].source)
        first = here * size
        chosen = [(piece, at, at[dim]) for piece, at in placed]
        kept = [
            dataclasses.replace(piece, at=_put(at, dim, index - first))
            for piece, at, index in chosen
            if isinstance(index, int) and first <= index < first + size
        ]
        return _put(shape, dim, size), tuple(kept)
    runs: dict[tuple[int, int], tuple[int, int]] = {}
    end = 0
    for piece, at in sorted(placed, key=lambda one: _run(one[1], dim, shape)):
        run = _run(at, dim, shape)
        if run not in runs:
            parts = ranks // piece.shared_by
            size = _equal(run[1] - run[0], parts, share.axis, piece.source)
            runs[run] = (end, end + size)
            end += size
    cut = []
    for piece, at in placed:
        start, stop = runs[_run(at, dim, shape)]
        inner = dim - sum(isinstance(index, int) for index in at[:dim])
        part = _parts(piece, filled_shape(shape, piece))
        begin = part[inner].start + here // piece.shared_by * (stop - start)
        cut.append(
            dataclasses.replace(
                piece,
                at=_put(at, dim, slice(start, stop)),
                part=_put(part, inner, slice(begin, begin + stop - start)),
            )
        )
    return _put(shape, dim, end), tuple(cut)


def _equal(size: int, parts: int, axis: str, source: str) -> int:
    if size % parts:
        flag = " × ".join(FLAGS[name] for name in ((axis,) if axis in FLAGS else ("moe_ep", "moe_tp")))
        fits = max(number for number in range(1, parts + 1) if size % number == 0)
        raise ConfigError(
            f"{source}: {size} cannot be cut into {parts} equal parts ({flag}); the nearest number below is {fits}"
        )
    return size // parts


def _every_dim(at: tuple[slice | int, ...], num_dims: int) -> tuple[slice | int, ...]:
    return (*at, *(slice(None),) * (num_dims - len(at)))


def _run(at: tuple[slice | int, ...], dim: int, shape: Shape) -> tuple[int, int]:
    cut = at[dim]
    assert isinstance(cut, slice)
    start, stop, _ = cut.indices(shape[dim])
    return start, stop


def _parts(piece: Piece, filled: Shape) -> tuple[slice, ...]:
    """What of the checkpoint tensor the piece takes, every dimension with a start and a stop."""
    given = (*piece.part, *(slice(None),) * (len(filled) - len(piece.part)))
    return tuple(
        slice(0, size) if cut.stop is None else slice(cut.start or 0, cut.stop)
        for cut, size in zip(given, filled, strict=True)
    )


def _put(values: tuple[T, ...], index: int, value: T) -> tuple[T, ...]:
    return (*values[:index], value, *values[index + 1 :])
