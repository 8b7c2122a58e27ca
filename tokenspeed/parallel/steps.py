"""The steps of a compiled program: what every rank does, in order, to the tensors that it holds under a few names.

`x` is what the last module gave, `residual` the stream that norms add it to; a module beside another has its path
for a name. A transfer names the atoms that it joins: each set of ranks that differ along these atoms alone
(`Mesh.atom_sets`) does it among itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from tokenspeed.parallel.layout import Layout

X, RESIDUAL = "x", "residual"


@dataclass(frozen=True, slots=True)
class Transfer:
    """Changes the layout of `tensor` along the atoms from `first` to before `stop`, from one letter to another."""

    tensor: str
    first: int
    stop: int

    before: ClassVar[str]
    after: ClassVar[str]
    verb: ClassVar[str]

    @classmethod
    def legal(cls, layout: Layout, first: int, stop: int) -> bool:
        """Whether it can be done on a tensor that lies so: tokens come and go at the innermost `V`, features at the
        innermost `S`, because only there the parts are neighbours."""
        letters, depth = layout.letters, layout.depth
        return (
            set(letters[first:stop]) == {cls.before}
            and (cls.after != "V" or first == depth)
            and (cls.before != "V" or stop == depth)
            and (cls.before != "S" or "S" not in letters[stop:])
        )

    def applied(self, layout: Layout) -> Layout:
        """Where the tensor lies afterwards."""
        return layout.with_letter(self.first, self.stop, self.after)


class AllReduce(Transfer):
    """Everybody gets the sum."""

    before, after, verb = "P", "R", "all-reduce"


class ReduceScatter(Transfer):
    """Everybody gets the sum of a part of the tokens, padded to equal parts."""

    before, after, verb = "P", "V", "reduce-scatter"


class AllGather(Transfer):
    """Everybody gets everybody's tokens, one below the other."""

    before, after, verb = "V", "R", "all-gather"


class Slice(Transfer):
    """Everybody keeps a part of the tokens; nothing is sent."""

    before, after, verb = "R", "V", "slice"


class GatherFeatures(Transfer):
    """Everybody gets everybody's features, side by side."""

    before, after, verb = "S", "R", "all-gather of features"


class AllToAll(Transfer):
    """Everybody gives slices of all tokens for all features of a part of them."""

    before, after, verb = "S", "V", "all-to-all"


class Dispatch(Transfer):
    """Each token goes to those ranks that hold what it asks for; all of them together see all tokens."""

    before, after, verb = "V", "R", "dispatch"


class Combine(Transfer):
    """What the ranks that a token was sent to made of it comes back to where it is from, and is summed."""

    before, after, verb = "P", "V", "combine"


MOVES: tuple[type[Transfer], ...] = (
    AllReduce,
    ReduceScatter,
    AllGather,
    Slice,
    GatherFeatures,
    AllToAll,
)
"""What brings a tensor from one layout to another. `Dispatch` and `Combine` belong to their module."""


def moves_from(layout: Layout, tensor: str) -> Iterator[Transfer]:
    """Every legal transfer of a tensor that lies so."""
    for kind in MOVES:
        for first in range(len(layout.letters)):
            for stop in range(first + 1, len(layout.letters) + 1):
                if kind.legal(layout, first, stop):
                    yield kind(tensor, first, stop)


@dataclass(frozen=True, slots=True)
class Run:
    """tensor = module(tensor)."""

    module: str
    tensor: str


@dataclass(frozen=True, slots=True)
class Norm:
    """x, residual = module(x, residual); the first norm of a model has no residual yet."""

    module: str


@dataclass(frozen=True, slots=True)
class AllReduceNorm:
    """An all-reduce of x and the norm behind it, as one kernel."""

    module: str
    first: int
    stop: int


@dataclass(frozen=True, slots=True)
class Copy:
    """`to` is another name of what x is now."""

    to: str


@dataclass(frozen=True, slots=True)
class Add:
    """x += `term`, which is needed no more."""

    term: str


@dataclass(frozen=True, slots=True)
class Select:
    """x keeps the tokens that are sampled from."""


Step = Transfer | Run | Norm | AllReduceNorm | Copy | Add | Select


@dataclass(frozen=True, slots=True)
class Planned:
    """A step with what it costs a rank: bytes sent, and seconds of the transfer or the norm. What a module computes
    is not counted here (`Program.timing`). `kept`: of the seconds of a transfer that norms as well, those that the norm
    would take as a kernel of its own if nothing were sent."""

    step: Step
    sent: int = 0
    seconds: float = 0.0
    kept: float = 0.0
