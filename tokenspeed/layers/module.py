"""What every layer is built from: a context, a boundary, and weights declared as data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from tokenspeed.errors import ConfigError
from tokenspeed.kernels import ops
from tokenspeed.kernels.forms import GROUP, PANELS, QUANTISED, ROWS, Packed, common_form, packed_shape
from tokenspeed.kernels.platform import Platform
from tokenspeed.layers.memory import ParameterMemory
from tokenspeed.parallel.cost import Work
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.placement import Boundary
from tokenspeed.parallel.shards import Piece, Shape, Share, local


@dataclass(frozen=True)
class BuildContext:
    """Where and how a model is built; handed to every constructor.

    `target` is what the kernels are selected for; `memory` where parameters lie; `max_positions` the longest sequence
    the engine will run, which sizes the rotary tables; `block_size` tokens a KV block; `prefix` the dotted name of the
    checkpoint tensors of the module under construction; `rank` the rank of `mesh` that the model is built for.
    `forms` says which checkpoint tensors are matrices that kernels multiply as they are stored, and in which form;
    `plain_form` is the form that all other matrices get when they are loaded: rows, panels, or q8_0, to which they are
    rounded.
    """

    device: torch.device
    dtype: torch.dtype
    target: ops.Target
    memory: ParameterMemory
    mesh: Mesh
    max_positions: int
    block_size: int
    prefix: str = ""
    rank: int = 0
    forms: Mapping[str, str] = field(default_factory=dict)
    plain_form: str = ROWS

    @classmethod
    def of(
        cls,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_positions: int,
        block_size: int,
        mesh: Mesh | None = None,
        rank: int = 0,
        forms: Mapping[str, str] | None = None,
        plain_form: str = ROWS,
    ) -> BuildContext:
        """A context for `device`; without a mesh, for one rank."""
        return cls(
            device=device,
            dtype=dtype,
            target=ops.Target(platform=Platform.of(device), dtype=dtype),
            memory=ParameterMemory(device),
            mesh=Mesh.single() if mesh is None else mesh,
            max_positions=max_positions,
            block_size=block_size,
            rank=rank,
            forms={} if forms is None else forms,
            plain_form=plain_form,
        )

    def on(self, device: torch.device) -> BuildContext:
        """The same context with parameters on another device, "meta" for a model without memory; kernels are still
        those of the target."""
        return dataclasses.replace(self, device=device, memory=ParameterMemory(device))

    def inside(self, name: str) -> BuildContext:
        """The same context for a part whose checkpoint tensors are called `prefix`.`name`.…"""
        return dataclasses.replace(self, prefix=self.name(name))

    def in_rows(self) -> BuildContext:
        """The same context for a part whose kernels take all matrices as rows."""
        return dataclasses.replace(self, forms={}, plain_form=ROWS)

    def name(self, name: str) -> str:
        """The full checkpoint name of `name`."""
        return f"{self.prefix}.{name}" if self.prefix else name


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter as one rank holds it, the pieces of checkpoint tensors that fill it there, and the whole of which it
    is the rank's share: its shape and pieces before it was cut, and how it was cut.

    Without pieces the parameter stays as it was declared, zero: its value is another rank's to add. `shape` is the
    rank's share of the numbers; in another `form` than rows the parameter holds them packed.
    """

    parameter: nn.Parameter
    pieces: tuple[Piece, ...]
    whole_shape: Shape
    whole_pieces: tuple[Piece, ...]
    shares: tuple[Share, ...]
    shape: Shape
    form: str = ROWS


class Module(nn.Module):
    """A layer as one rank computes it.

    A subclass declares its `boundary`, as a class attribute or in its constructor where the axis is an
    argument; says with `linear` whether it passes a sum through; and yields its parts from `stages` in
    the order of the data flow. A part of a model's stream says with `row_bytes` what one token of its output takes
    over all its features, and with `sampled_only` that it is told of no tokens but those sampled from. Nothing trains:
    parameters take no gradient.
    """

    boundary: Boundary | None = None
    linear: bool = False
    row_bytes: int = 0
    sampled_only: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._weights: list[Weight] = []

    def stages(self) -> Iterable[tuple[str, Module]]:
        """The parts in the order of the data flow, each under its name."""
        return ()

    def beside(self) -> Iterable[tuple[str, Module]]:
        """Modules that take the same input, and whose outputs are added to this one's."""
        return ()

    def work(self, tokens: int) -> Work:
        """What this rank does for `tokens` tokens: its weights read once, two operations for each of their numbers a
        token, and what its parts do."""
        numbers = sum(math.prod(weight.shape) for weight in self._weights)
        read = sum(weight.parameter.numel() * weight.parameter.element_size() for weight in self._weights)
        return sum((part.work(tokens) for _, part in self.stages()), Work(read, 2.0 * numbers * tokens))

    def declare(
        self,
        ctx: BuildContext,
        shape: Shape,
        pieces: Iterable[Piece],
        *shares: Share,
        dtype: torch.dtype | None = None,
    ) -> nn.Parameter:
        """A new, uninitialised parameter that the checkpoint tensors of `pieces` fill together.

        `shape` and `pieces` are those of the whole; `shares` say how its dimensions are cut over ranks, and the
        parameter is what is left of it for the context's rank. `dtype` is the context's unless given.
        Raises `ConfigError` for a dimension that cannot be cut so, or when there is no memory.
        """
        whole_shape, whole_pieces = shape, tuple(pieces)
        shape, kept = local(whole_shape, whole_pieces, shares, ctx.mesh, ctx.rank)
        parameter = _uninitialised(ctx, shape, ctx.dtype if dtype is None else dtype, zeros=not kept)
        self._weights.append(Weight(parameter, kept, whole_shape, whole_pieces, shares, shape))
        return parameter

    def declare_matrix(self, ctx: BuildContext, shape: Shape, pieces: Iterable[Piece], *shares: Share) -> ops.Matrix:
        """As `declare`, for a matrix [N,K] that is only multiplied with, or looked up: in the form that its pieces have
        in common, where this rank holds whole groups of each of their rows; else as plain numbers."""
        whole_pieces = tuple(pieces)
        (rows, columns), kept = local(shape, whole_pieces, shares, ctx.mesh, ctx.rank)
        form = common_form({ctx.forms.get(piece.source, ctx.plain_form) for piece in kept})
        if form == ROWS or (form in QUANTISED and columns != shape[1] and columns % GROUP):
            form = PANELS if ctx.plain_form == PANELS else ROWS
        if form == ROWS:
            return self.declare(ctx, shape, whole_pieces, *shares)
        packed, dtype = packed_shape(form, rows, columns, ctx.dtype)
        parameter = _uninitialised(ctx, packed, dtype, zeros=True)
        self._weights.append(Weight(parameter, kept, shape, whole_pieces, shares, (rows, columns), form))
        self.register_parameter("packed", parameter)
        return Packed(parameter, form, rows, columns)

    def weights(self) -> Iterator[Weight]:
        """Every weight of this module and its parts, each once."""
        for module in self.modules():
            if isinstance(module, Module):
                yield from module._weights


def _uninitialised(ctx: BuildContext, shape: Shape, dtype: torch.dtype, *, zeros: bool) -> nn.Parameter:
    try:
        values = ctx.memory.take(shape, dtype, zeros=zeros)
    except (RuntimeError, OSError) as error:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"no memory for {ctx.prefix}: {list(shape)} of {name} on {ctx.device}, the model is too large"
        ) from error
    return nn.Parameter(values, requires_grad=False)
