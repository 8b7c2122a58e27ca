"""From a tree of modules to the chain that its tokens walk: blocks and the norms between them.

A norm on the residual stream declares `AnyTokens`. A module with such a norm inside is a stretch of the stream and is
taken apart; any other is a block, whose inside was checked once: nothing is moved there, so what one part gives has
to be what the next one takes. What cannot be is refused with the names of both modules.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.cost import Work
from tokenspeed.parallel.layout import Layout, layout_of
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.placement import AnyTokens, Boundary, Partial, Placement, Replicate, Routed, Varying

TOKEN_ID_BYTES = 8


class Placed(Protocol):
    """What the compiler reads of a module.

    `linear` says that f(a + b) = f(a) + f(b), so that the module may take a `Partial`. `row_bytes` is what one token
    of its output takes, over all features; `sampled_only` says that it needs no tokens but those sampled from.
    """

    boundary: Boundary | None
    linear: bool
    row_bytes: int
    sampled_only: bool

    def stages(self) -> Iterable[tuple[str, Placed]]:
        """The parts in the order of the data flow, each under its name; none for a module without inner parts."""

    def beside(self) -> Iterable[tuple[str, Placed]]:
        """Blocks that take the same input, and whose outputs are added to this one's."""

    def work(self, tokens: int) -> Work:
        """What one rank does for `tokens` tokens that it sees."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Two parts of a block, between which tokens may be sent along the atoms from `first` to before `stop`, to those
    ranks alone that they ask; at most `fan_out` of them a token."""

    router: str
    experts: str
    first: int
    stop: int
    fan_out: int


@dataclass(frozen=True, slots=True)
class StreamNorm:
    """A norm on the residual stream, in whatever layout suits."""

    path: str
    row_bytes: int
    module: Placed


@dataclass(frozen=True, slots=True)
class Block:
    """A module that takes one layout and gives another; `beside` it are those that share its input."""

    path: str
    takes: Layout
    gives: Layout
    row_bytes: int
    sampled_only: bool
    exchange: Exchange | None
    beside: tuple[Block, ...]
    module: Placed


@dataclass(frozen=True, slots=True)
class Chain:
    """What a model's tokens walk. `takes` and `gives` are the layouts that whoever runs the model hands in and gets."""

    name: str
    takes: Layout
    gives: Layout
    elements: tuple[Block | StreamNorm, ...]


def chain_of(model: Placed, mesh: Mesh, name: str) -> Chain:
    """Walk the boundaries of `model`. Raises `ConfigError` naming the modules for what cannot be on any mesh, or on
    this one."""
    boundary = _declared(name, model, None)
    ends = []
    for placement in (boundary.takes, boundary.gives):
        if not isinstance(placement, Replicate | Varying):
            raise ConfigError(f"{name} ({placement}): a model takes and gives whole tokens, Replicate or Varying")
        ends.append(layout_of(placement, mesh, name))
    elements = tuple(_stretch(name, model, mesh))
    first = elements[0] if elements else None
    if first is None or isinstance(first, StreamNorm):
        raise ConfigError(f"{name} begins with {'nothing' if first is None else first.path}: no block makes a stream")
    return Chain(name, ends[0], ends[1], elements)


def _declared(path: str, module: Placed, source: str | None) -> Boundary:
    fed = "" if source is None else f" (fed by {source})"
    if module.boundary is None:
        raise ConfigError(f"{path}{fed} declares no boundary, so nothing says how its input lies over the ranks")
    if isinstance(module.boundary.takes, Partial) and not module.linear:
        raise ConfigError(
            f"{path}{fed} takes {module.boundary.takes} but is not linear: "
            f"a norm or an activation needs the sum, so a boundary that reduces must come between"
        )
    return module.boundary


def _on_stream(module: Placed) -> bool:
    """Whether the module is a stretch of the stream, not a block."""
    return any(
        part.boundary is not None and (isinstance(part.boundary.takes, AnyTokens) or _on_stream(part))
        for _, part in module.stages()
    )


def _stretch(path: str, module: Placed, mesh: Mesh) -> Iterator[Block | StreamNorm]:
    """The elements inside a stretch of the stream."""
    before = path
    gives: Placement | None = None
    for part_name, part in module.stages():
        inner = f"{path}.{part_name}"
        boundary = _declared(inner, part, before)
        if isinstance(boundary.takes, Partial) and gives != boundary.takes:
            raise ConfigError(
                f"{before} gives {gives}, but {inner} takes {boundary.takes}: "
                f"a sum over the ranks is made by a module, no hand-over can invent its terms"
            )
        if _on_stream(part):
            _check_ends(inner, part)
            yield from _stretch(inner, part, mesh)
        elif isinstance(boundary.takes, AnyTokens):
            if boundary.gives != boundary.takes:
                raise ConfigError(f"{inner} takes {boundary.takes} but gives {boundary.gives}: it must give the same")
            yield StreamNorm(inner, part.row_bytes, part)
        else:
            yield _block(inner, part, mesh, before)
        before, gives = inner, boundary.gives


def _check_ends(path: str, module: Placed) -> None:
    """A part's boundary is the first of its inner parts' where it begins, the last's where it ends."""
    outer = _declared(path, module, None)
    parts = [(f"{path}.{name}", _declared(f"{path}.{name}", part, path)) for name, part in module.stages()]
    if not parts:
        return
    (first, begins), (last, ends) = parts[0], parts[-1]
    if begins.takes != outer.takes:
        raise ConfigError(f"{path} takes {outer.takes}, but its first part {first} takes {begins.takes}")
    if ends.gives != outer.gives:
        raise ConfigError(f"{path} gives {outer.gives}, but its last part {last} gives {ends.gives}")


def _block(path: str, module: Placed, mesh: Mesh, source: str) -> Block:
    boundary = _declared(path, module, source)
    takes = layout_of(boundary.takes, mesh, f"{source} → {path}")
    gives = layout_of(boundary.gives, mesh, path)
    beside = tuple(_block(f"{path}.{name}", part, mesh, path) for name, part in module.beside())
    for other in beside:
        if other.row_bytes != module.row_bytes:
            raise ConfigError(
                f"{path} and {other.path} are added, but a token of them takes {module.row_bytes} and "
                f"{other.row_bytes} bytes"
            )
    exchange = _inside(path, module, mesh)
    return Block(path, takes, gives, module.row_bytes, module.sampled_only, exchange, beside, module)


def _inside(path: str, module: Placed, mesh: Mesh) -> Exchange | None:
    """Check what is inside a block, and find where it could send tokens to experts."""
    _check_ends(path, module)
    found: Exchange | None = None
    parts = [(f"{path}.{name}", part) for name, part in module.stages()]
    for (source, first), (target, second) in itertools.pairwise(parts):
        gives, takes = _declared(source, first, None).gives, _declared(target, second, source).takes
        if isinstance(gives, Routed) and gives == takes:
            found = _exchange(source, target, gives, _declared(path, module, None), mesh)
            continue
        where = f"{source} → {target}"
        same = type(gives) is type(takes) and layout_of(gives, mesh, where) == layout_of(takes, mesh, where)
        if not same:
            raise ConfigError(
                f"{source} gives {gives}, but {target} takes {takes}: inside a block nothing is moved; "
                f"let {target} take {gives}, or end the block {path} behind {source}"
            )
    for inner, part in parts:
        found = _inside(inner, part, mesh) or found
    return found


def _exchange(router: str, experts: str, routed: Routed, around: Boundary, mesh: Mesh) -> Exchange | None:
    """Tokens can be sent where they can be divided over the ranks that hold experts."""
    if mesh.factoring(routed.axis) is None:
        raise ConfigError(f"{router} → {experts} ({routed}): the mesh has no axis {routed.axis!r}")
    span = mesh.span(routed.axis)
    if not span or span.start != layout_of(around.takes, mesh, router).depth:
        return None
    return Exchange(router, experts, span.start, span.stop, routed.fan_out)
