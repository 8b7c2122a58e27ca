"""Layouts: where a tensor [tokens, features] lies, atom by atom of a mesh.

A layout is one letter an atom, outermost first:

* `R` the ranks along the atom hold the same,
* `P` they hold terms of a sum,
* `V` they hold tokens of their own: the tokens are divided over all `V` atoms, outermost first,
* `S` they hold slices of the features, divided over all `S` atoms, outermost first.

Where a part of a model is copied (`attn_copies`), the ranks along it compute the same from the same: they hold the
same, R, whatever lies inside of it.

Tokens are divided over the outermost atoms only, so a rank's tokens are always a run of neighbours, and gathering
them is a concatenation. Attention data parallelism divides them: each group owns the tokens of its requests, padded
to the common maximum, which every rank knows from the plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.placement import Partial, Placement, Replicate, Routed, Shard, Varying


@dataclass(frozen=True, slots=True)
class Layout:
    """`letters` has one of R, P, V, S for each atom of the mesh that it belongs to; the V come first."""

    letters: str

    @classmethod
    def divided(cls, depth: int, num_atoms: int) -> Layout:
        """Whole tokens, divided over the `depth` outermost atoms and replicated over the others."""
        return cls("V" * depth + "R" * (num_atoms - depth))

    @property
    def depth(self) -> int:
        """How many atoms divide the tokens."""
        return self.letters.count("V")

    def ranks(self, mesh: Mesh, letter: str) -> int:
        """Over how many ranks the atoms with `letter` reach."""
        atoms = zip(self.letters, mesh.atoms(), strict=True)
        return math.prod(atom.size for has, atom in atoms if has == letter)

    def with_letter(self, first: int, stop: int, letter: str) -> Layout:
        """The same but for the atoms from `first` to before `stop`."""
        return Layout(self.letters[:first] + letter * (stop - first) + self.letters[stop:])

    def __str__(self) -> str:
        return self.letters or "one rank"


def layout_of(placement: Placement, mesh: Mesh, module: str) -> Layout:
    """Where a tensor with this placement lies. `module` is named in errors.

    Raises `ConfigError` for an axis that the mesh lacks, a part that does not fill the world, and tokens that would be
    divided over an inner axis but not over the ones around it.
    """
    if not isinstance(placement, Replicate | Shard | Partial | Varying | Routed):
        raise ConfigError(f"{module}: {placement} names no axis, so nothing says where the tensor lies")
    axes = mesh.factoring(placement.axis)
    if axes is None:
        raise ConfigError(f"{module} ({placement}): the mesh has no axis {placement.axis!r}")
    if not mesh.fills_world(placement.axis):
        sizes = " × ".join(f"{name} {size}" for name, size in axes)
        raise ConfigError(
            f"{module} ({placement}): the axes {sizes} do not factor a world of {mesh.world} ranks"
        )
    span = mesh.span(placement.axis)
    letter = _letter(placement, module)
    copied = mesh.copied(placement.axis)
    letters = "".join(letter if i in span else "R" if i in copied else "V" for i in range(len(mesh.atoms())))
    if "V" in letters.lstrip("V"):
        raise ConfigError(
            f"{module} ({placement}): tokens are divided over the outermost axes, but the ranks inside "
            f"{placement.axis} would have tokens of their own; name the axes inside it too"
        )
    return Layout(letters)


def _letter(placement: Placement, module: str) -> str:
    match placement:
        case Replicate():
            return "R"
        case Partial():
            return "P"
        case Varying() | Shard(dim=0):
            return "V"
        case Shard(dim=-1 | 1):
            return "S"
    raise ConfigError(f"{module} ({placement}): a tensor of tokens and features is cut in dimension 0 or -1")
