"""Placements: how the tensor between two modules lies over the ranks.

A module is written as what one rank computes, and declares what enters and what leaves it. Names of axes
belong to a `Mesh`, which says how each part of the model factors the ranks of one world. Nothing here
knows torch; the compiler reads these declarations once, when a model is built.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank of `axis` holds the whole tensor, and the same one."""

    axis: str

    def __str__(self) -> str:
        return f"Replicate({self.axis})"


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank i of `axis` holds the i-th equal slice of dimension `dim`."""

    axis: str
    dim: int

    def __str__(self) -> str:
        return f"Shard({self.axis}, {self.dim})"


@dataclass(frozen=True, slots=True)
class Partial:
    """The tensor is the sum of what the ranks of `axis` hold. Only linear operations pass it on."""

    axis: str

    def __str__(self) -> str:
        return f"Partial({self.axis})"


@dataclass(frozen=True, slots=True)
class Varying:
    """Each rank of `axis` holds tokens of its own: neither the same tensor nor slices of one."""

    axis: str

    def __str__(self) -> str:
        return f"Varying({self.axis})"


Placement = Replicate | Shard | Partial | Varying


@dataclass(frozen=True, slots=True)
class Boundary:
    """What a module takes in and what it gives."""

    takes: Placement
    gives: Placement


@dataclass(frozen=True, slots=True)
class Mesh:
    """A world of ranks 0 … `world` − 1, factored by each part of a model in its own way.

    `factorings` maps a part to its axes, outermost first, each a (name, size): for example
    `("attention", (("attn_data", 2), ("attn", 4)))` on eight ranks. The name of an axis is unique in the
    mesh. Whether a factoring fills the world is the compiler's to say, because it can name the modules.
    """

    world: int
    factorings: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]

    @classmethod
    def single(cls) -> Mesh:
        """One rank: every axis that a model of this package names has size 1."""
        return cls(
            world=1,
            factorings=(
                ("attention", (("attn_data", 1), ("attn", 1))),
                ("dense", (("dense_data", 1), ("dense", 1))),
                ("vocabulary", (("vocab_data", 1), ("vocab", 1))),
            ),
        )

    def factoring(self, axis: str) -> tuple[tuple[str, int], ...] | None:
        """The axes of the part that `axis` belongs to, None if the mesh does not have it."""
        for _, axes in self.factorings:
            if any(name == axis for name, _ in axes):
                return axes
        return None

    def size(self, axis: str) -> int:
        """Ranks along `axis`; KeyError if the mesh does not have it."""
        axes = self.factoring(axis)
        if axes is None:
            raise KeyError(axis)
        return dict(axes)[axis]

    def fills_world(self, axis: str) -> bool:
        """True when the part that `axis` belongs to uses every rank exactly once."""
        axes = self.factoring(axis)
        return axes is not None and math.prod(size for _, size in axes) == self.world

    def rank_sets(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """The sets of ranks that differ only along `axis`, row-major in the factoring's order."""
        axes = self.factoring(axis)
        if axes is None:
            raise KeyError(axis)
        sets: dict[tuple[int, ...], list[int]] = {}
        where = [name for name, _ in axes].index(axis)
        for rank, coordinates in enumerate(itertools.product(*(range(size) for _, size in axes))):
            others = (*coordinates[:where], *coordinates[where + 1 :])
            sets.setdefault(others, []).append(rank)
        return tuple(tuple(ranks) for ranks in sets.values())
