"""Placements: how the tensor between two modules lies over the ranks.

A module is written as what one rank computes, and declares what enters and what leaves it. Names of axes
belong to a `Mesh`, which says how each part of the model factors the ranks of one world. Nothing here
knows torch; the compiler reads these declarations when a model is built.

The tensor between two modules is [tokens, features]. An axis that a declaration names is one of a part's axes;
along the part's other axes every rank has tokens of its own.
"""

from __future__ import annotations

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
    """The tensor is the sum of what the ranks of `axis` hold. Only linear operations pass it on.

    Of a weight: a term that may be added only once. The first rank of `axis` has it, the others have zeros.
    """

    axis: str

    def __str__(self) -> str:
        return f"Partial({self.axis})"


@dataclass(frozen=True, slots=True)
class Varying:
    """Each rank of `axis` holds tokens of its own: neither the same tensor nor slices of one."""

    axis: str

    def __str__(self) -> str:
        return f"Varying({self.axis})"


@dataclass(frozen=True, slots=True)
class Routed:
    """Tokens with what each of them asks for: at most `fan_out` things, dealt over the ranks of `axis`.

    Between the two modules tokens may be seen by every rank, or sent to those ranks alone that they ask.
    """

    axis: str
    fan_out: int

    def __str__(self) -> str:
        return f"Routed({self.axis}, {self.fan_out})"


@dataclass(frozen=True, slots=True)
class AnyTokens:
    """Whole tokens, wherever they lie: what works on each token by itself takes any layout that neither is a sum
    nor cuts features, and gives the same. The compiler chooses it."""

    def __str__(self) -> str:
        return "AnyTokens"


Placement = Replicate | Shard | Partial | Varying | Routed | AnyTokens


@dataclass(frozen=True, slots=True)
class Boundary:
    """What a module takes in and what it gives."""

    takes: Placement
    gives: Placement
