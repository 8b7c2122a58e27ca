"""A mesh: how each part of a model factors the ranks of one world, and the atoms that all parts have in common.

Ranks are numbered row-major: the last axis of a part joins neighbours. Two parts may factor the world differently,
for example attention as 2 × 4 and experts as 8 × 1. What they have in common are *atoms*: the world cut at every
place where some part cuts it, so that each axis of each part is a run of neighbouring atoms. This is possible when
the strides of all axes, sorted, divide each other.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tokenspeed.errors import ConfigError

Axes = tuple[tuple[str, int], ...]
"""The axes of a part, outermost first, each a name and a size."""

FLAGS = {
    "attn": "--attn-tp-size",
    "attn_copies": "--attn-copies",
    "attn_data": "--attn-dp-size",
    "dense": "--dense-tp-size",
    "moe_ep": "--moe-ep-size",
    "moe_tp": "--moe-tp-size",
    "vocab": "--vocab-tp-size",
}
"""Which flag sizes an axis."""

ARGUMENTS = {
    "attn": "attn_tp",
    "attn_copies": "attn_copies",
    "attn_data": "attn_dp",
    "dense": "dense_tp",
    "moe_ep": "moe_ep",
    "moe_tp": "moe_tp",
    "vocab": "vocab_tp",
}
"""Which argument of `Mesh.of` sizes an axis."""

MOE = ("moe_ep", "moe_tp")

COPIES = ("attn_copies",)
"""Axes along which ranks hold the same weights of a part, are given the same tokens and compute the same."""


@dataclass(frozen=True, slots=True)
class Atom:
    """`size` ranks, each `stride` after the one before."""

    stride: int
    size: int


@dataclass(frozen=True, slots=True)
class Mesh:
    """A world of ranks 0 … `world` − 1, factored by each part of a model in its own way.

    `factorings` maps a part to its axes, for example `("attention", (("attn_data", 2), ("attn", 4)))` on eight
    ranks. The name of an axis is unique in the mesh. `joined` names neighbouring axes of one part together. Whether
    a factoring fills the world is the compiler's to say, because it can name the modules.
    """

    world: int
    factorings: tuple[tuple[str, Axes], ...]
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def single(cls) -> Mesh:
        """One rank: every axis that a model of this package names has size 1."""
        return cls.of(1)

    @classmethod
    def of(
        cls,
        world: int,
        *,
        attn_tp: int | None = None,
        attn_dp: int | None = None,
        attn_copies: int | None = None,
        dense_tp: int | None = None,
        moe_tp: int | None = None,
        moe_ep: int | None = None,
        vocab_tp: int | None = None,
    ) -> Mesh:
        """The mesh that flags ask for. What is left out: attention over all ranks, in one copy; dense layers and the
        vocabulary over the ranks that attend to the same tokens; each expert over the ranks that expert parallelism
        leaves.

        Raises `ConfigError` naming the flags whose product the world cannot be cut into, or which cut it in ways
        that do not fit each other.
        """
        if world < 1:
            raise ConfigError(f"a world must have at least 1 rank, got {world}")
        asked = {"attn": attn_tp, "attn_data": attn_dp, "attn_copies": attn_copies, "dense": dense_tp}
        for axis, size in {**asked, "moe_tp": moe_tp, "moe_ep": moe_ep, "vocab": vocab_tp}.items():
            if size is not None and size < 1:
                raise ConfigError(f"{FLAGS[axis]} must be at least 1, got {size}")
        attention = _attention(world, attn_tp, attn_dp, attn_copies)
        together = math.prod(size for name, size in attention if name != "attn_data")
        dense, vocab = dense_tp or together, vocab_tp or together
        experts = moe_ep or 1
        inside = _rest(world, {"moe_ep": experts}) if moe_tp is None else moe_tp
        mesh = cls(
            world,
            (
                ("attention", attention),
                ("dense", (("dense_data", _rest(world, {"dense": dense})), ("dense", dense))),
                (
                    "experts",
                    (
                        ("moe_data", _rest(world, {"moe_ep": experts, "moe_tp": inside})),
                        ("moe_ep", experts),
                        ("moe_tp", inside),
                    ),
                ),
                ("vocabulary", (("vocab_data", _rest(world, {"vocab": vocab})), ("vocab", vocab))),
            ),
            (("moe", MOE),),
        )
        mesh.atoms()
        return mesh

    def factoring(self, axis: str) -> Axes | None:
        """The axes of the part that `axis` belongs to, None if the mesh does not have it."""
        first = dict(self.joined).get(axis, (axis,))[0]
        return next((axes for _, axes in self.factorings if any(name == first for name, _ in axes)), None)

    def size(self, axis: str) -> int:
        """Ranks along `axis`; KeyError if the mesh does not have it."""
        low, high = self._strides(axis)
        return high // low

    def coordinate(self, rank: int, axis: str) -> int:
        """Where `rank` stands along `axis`."""
        low, high = self._strides(axis)
        return rank % high // low

    def fills_world(self, axis: str) -> bool:
        """True when the part that `axis` belongs to uses every rank exactly once."""
        axes = self.factoring(axis)
        return axes is not None and math.prod(size for _, size in axes) == self.world

    def atoms(self) -> tuple[Atom, ...]:
        """The world cut wherever a part cuts it, outermost first. Raises `ConfigError` naming two parts that cut it
        in ways that do not fit each other."""
        return _atoms(self)

    def span(self, axis: str) -> range:
        """The atoms that `axis` consists of; none if its size is 1."""
        low, high = self._strides(axis)
        inside = [i for i, atom in enumerate(self.atoms()) if low <= atom.stride < high]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

    def copied(self, axis: str) -> range:
        """The atoms along which the ranks of the part that `axis` belongs to are copies of each other."""
        axes = self.factoring(axis) or ()
        return next((self.span(name) for name, _ in axes if name in COPIES), range(0))

    def rank_sets(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """The sets of ranks that differ only along `axis`, in their order along it."""
        low, high = self._strides(axis)
        return _rank_sets(self.world, low, high)

    def atom_sets(self, first: int, stop: int) -> tuple[tuple[int, ...], ...]:
        """The sets of ranks that differ only along the atoms from `first` to before `stop`."""
        atoms = self.atoms()[first:stop]
        return _rank_sets(self.world, atoms[-1].stride, atoms[0].stride * atoms[0].size)

    def _strides(self, axis: str) -> tuple[int, int]:
        """How far neighbours along `axis` are apart, and how far those of the axis around it."""
        axes = self.factoring(axis)
        if axes is None:
            raise KeyError(axis)
        names = dict(self.joined).get(axis, (axis,))
        where = [name for name, _ in axes].index(names[-1])
        low = math.prod(size for _, size in axes[where + 1 :])
        return low, low * math.prod(size for name, size in axes if name in names)

    def __str__(self) -> str:
        parts = (
            f"{part} " + (" × ".join(f"{name} {size}" for name, size in axes if size > 1) or "whole")
            for part, axes in self.factorings
        )
        return f"{self.world} rank{'s' if self.world > 1 else ''}: {'; '.join(parts)}"


def _attention(world: int, attn_tp: int | None, attn_dp: int | None, attn_copies: int | None) -> Axes:
    """The axes of attention. Copies stand inside of own tokens and outside of cut heads, so that those who exchange
    most are neighbours. Raises `ConfigError` as `Mesh.of` does."""
    copied = {} if attn_copies is None else {"attn_copies": attn_copies}
    copies = attn_copies or 1
    if attn_tp is None:
        attn_tp = _rest(world, copied if attn_dp is None else {"attn_data": attn_dp, **copied})
    data = _rest(world, {"attn": attn_tp, **copied})
    if attn_dp is not None and attn_dp != data:
        others = f"--attn-tp-size {attn_tp}" + f" × --attn-copies {copies}" * bool(copied)
        fixed = f"{attn_tp} × {copies}" if copied else f"{attn_tp}"
        raise ConfigError(
            f"{others} × --attn-dp-size {attn_dp} is {attn_tp * copies * attn_dp}, "
            f"but the world has {world} ranks: with {fixed}, --attn-dp-size must be {data}"
        )
    return ("attn_data", data), ("attn_copies", copies), ("attn", attn_tp)


def _rest(world: int, sizes: dict[str, int]) -> int:
    """The ranks that these axes leave to the axis around them. Raises `ConfigError` if they do not divide the world."""
    product = math.prod(sizes.values())
    if world % product == 0:
        return world // product
    flags = " × ".join(f"{FLAGS[axis]} {size}" for axis, size in sizes.items())
    is_product = f" is {product}, which" if len(sizes) > 1 else ""
    nearest = min(_divisors(world), key=lambda divisor: (abs(divisor - product), divisor))
    raise ConfigError(
        f"{flags}{is_product} does not divide a world of {world} ranks; the nearest that does is {nearest}"
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@functools.lru_cache(maxsize=64)
def _rank_sets(world: int, low: int, high: int) -> tuple[tuple[int, ...], ...]:
    starts = (outer + inner for outer in range(0, world, high) for inner in range(low))
    return tuple(tuple(range(start, start + high, low)) for start in starts)


@functools.lru_cache(maxsize=64)
def _atoms(mesh: Mesh) -> tuple[Atom, ...]:
    cuts = list(_cuts(mesh))
    for pair in itertools.combinations(cuts, 2):
        small, large = sorted(pair, key=lambda cut: cut[0])
        if large[0] % small[0]:
            raise ConfigError(_misfit(mesh.world, small, large))
    strides = sorted({1, mesh.world} | {stride for stride, _, _ in cuts})
    pairs = [(low, high // low) for low, high in itertools.pairwise(strides)]
    return tuple(Atom(stride, size) for stride, size in reversed(pairs))


def _cuts(mesh: Mesh) -> Iterator[tuple[int, str, Axes]]:
    """Every stride at which a part that fills the world cuts it, with that part."""
    for part, axes in mesh.factorings:
        if math.prod(size for _, size in axes) == mesh.world:
            for i in range(len(axes)):
                yield math.prod(size for _, size in axes[i:]), part, axes


def _misfit(world: int, small: tuple[int, str, Axes], large: tuple[int, str, Axes]) -> str:
    def said(axes: Axes) -> str:
        return " × ".join(f"{name} {size}" for name, size in axes)

    stride, part, axes = small
    larger, other, other_axes = large
    legal = [size for size in _divisors(world) if size % stride == 0 or stride % size == 0]
    nearest = min(legal, key=lambda size: (abs(size - larger), -size))
    inside = next(
        [name for name, size in other_axes[i:] if size > 1]
        for i in range(len(other_axes))
        if math.prod(size for _, size in other_axes[i:]) == larger
    )
    flags = " × ".join(FLAGS.get(name, name) for name in inside)
    return (
        f"{part} ({said(axes)}) and {other} ({said(other_axes)}) cut the {world} ranks in ways that do not fit each "
        f"other: {larger} is no multiple of {stride}; the nearest legal change is {flags} {nearest}"
    )
