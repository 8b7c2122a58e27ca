"""The static compiler: one walk over the boundaries of a model, when it is built.

The walk turns the model's data flow into a list of edges, each with what the producer gives and what the
consumer takes, and decides what has to happen on it. On one rank every legal edge is the identity; the
walk, its refusals and its printed form are the same as on many. An edge that cannot be is refused with
the names of both modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.placement import Boundary, Mesh, Partial, Placement


class Placed(Protocol):
    """What the compiler reads of a module.

    `linear` says that f(a + b) = f(a) + f(b), so that the module may take a `Partial`. `stages` yields
    the parts in the order of the data flow, each under its name; none for a module without inner parts.
    """

    boundary: Boundary | None
    linear: bool

    def stages(self) -> Iterable[tuple[str, Placed]]: ...


@dataclass(frozen=True, slots=True)
class Edge:
    """One hand-over: `source` gives, `target` takes. Names are dotted paths from the model's root."""

    source: str
    target: str
    gives: Placement
    takes: Placement

    def __str__(self) -> str:
        return f"{self.source} → {self.target}: {self.gives} → {self.takes}"


@dataclass(frozen=True, slots=True)
class Program:
    """The compiled form of a model: its edges in the order of the data flow."""

    mesh: Mesh
    edges: tuple[Edge, ...]

    def explain(self) -> str:
        """One line an edge. On one rank nothing is sent, so each resolves to the identity."""
        return "\n".join(f"{edge}  [identity]" for edge in self.edges)


def compile_model(model: Placed, mesh: Mesh, name: str) -> Program:
    """Walk `model` over `mesh` and return its edges.

    Raises `ConfigError` naming both modules of an edge that cannot be, and for a mesh of more than one
    rank, which this version does not support.
    """
    edges = tuple(_walk(name, model))
    for edge in edges:
        _check_axes(edge, mesh)
    if mesh.world != 1:
        raise ConfigError(f"a mesh of {mesh.world} ranks was asked for; this version supports one rank only")
    return Program(mesh, edges)


def _declared(name: str, module: Placed, source: str | None) -> Boundary:
    fed = "" if source is None else f" (fed by {source})"
    if module.boundary is None:
        raise ConfigError(f"{name}{fed} declares no boundary, so nothing says how its input lies over the ranks")
    if isinstance(module.boundary.takes, Partial) and not module.linear:
        raise ConfigError(
            f"{name}{fed} takes {module.boundary.takes} but is not linear: "
            f"a norm or an activation needs the sum, so a boundary that reduces must come between"
        )
    return module.boundary


def _walk(name: str, module: Placed) -> Iterator[Edge]:
    """The edges inside `module`, then nothing: its own hand-overs belong to whoever holds it."""
    outer = _declared(name, module, None)
    before: tuple[str, Boundary] | None = None
    for part_name, part in module.stages():
        path = f"{name}.{part_name}"
        inner = _declared(path, part, name if before is None else before[0])
        if before is None:
            if inner.takes != outer.takes:
                raise ConfigError(f"{name} takes {outer.takes}, but its first part {path} takes {inner.takes}")
        else:
            yield _edge(before[0], path, before[1].gives, inner.takes)
        yield from _walk(path, part)
        before = (path, inner)
    if before is not None and before[1].gives != outer.gives:
        raise ConfigError(f"{name} gives {outer.gives}, but its last part {before[0]} gives {before[1].gives}")


def _edge(source: str, target: str, gives: Placement, takes: Placement) -> Edge:
    if isinstance(takes, Partial) and gives != takes:
        raise ConfigError(
            f"{source} gives {gives}, but {target} takes {takes}: "
            f"a sum over the ranks is made by a module, no hand-over can invent its terms"
        )
    return Edge(source, target, gives, takes)


def _check_axes(edge: Edge, mesh: Mesh) -> None:
    for axis in dict.fromkeys((edge.gives.axis, edge.takes.axis)):
        axes = mesh.factoring(axis)
        if axes is None:
            raise ConfigError(f"{edge.source} → {edge.target}: the mesh has no axis {axis!r}")
        if not mesh.fills_world(axis):
            sizes = " × ".join(f"{name} {size}" for name, size in axes)
            raise ConfigError(
                f"{edge.source} ({edge.gives}) → {edge.target} ({edge.takes}): "
                f"the axes {sizes} do not factor a world of {mesh.world} ranks"
            )
