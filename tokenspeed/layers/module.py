"""What every layer is built from: a context, a boundary, and weights declared as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from tokenspeed.errors import ConfigError
from tokenspeed.kernels import ops
from tokenspeed.kernels.platform import Platform
from tokenspeed.parallel.placement import Boundary, Mesh, Placement


@dataclass(frozen=True)
class BuildContext:
    """Where and how a model is built; handed to every constructor.

    `target` is what the kernels are selected for; `max_positions` the longest sequence the engine will
    run, which sizes the rotary tables; `block_size` tokens a KV block; `prefix` the dotted name of the
    checkpoint tensors of the module under construction.
    """

    device: torch.device
    dtype: torch.dtype
    target: ops.Target
    mesh: Mesh
    max_positions: int
    block_size: int
    prefix: str = ""

    @classmethod
    def of(
        cls,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_positions: int,
        block_size: int,
        mesh: Mesh | None = None,
    ) -> BuildContext:
        """A context for `device`; without a mesh, for one rank."""
        return cls(
            device=device,
            dtype=dtype,
            target=ops.Target(platform=Platform.of(device), dtype=dtype),
            mesh=Mesh.single() if mesh is None else mesh,
            max_positions=max_positions,
            block_size=block_size,
        )

    def inside(self, name: str) -> BuildContext:
        """The same context for a part whose checkpoint tensors are called `prefix`.`name`.…"""
        return dataclasses.replace(self, prefix=self.name(name))

    def name(self, name: str) -> str:
        """The full checkpoint name of `name`."""
        return f"{self.prefix}.{name}" if self.prefix else name


@dataclass(frozen=True)
class Piece:
    """One checkpoint tensor and the part of a parameter that it fills: `parameter[at]` has its shape."""

    source: str
    at: tuple[slice | int, ...]


@dataclass(frozen=True, eq=False)
class Weight:
    """A parameter, the checkpoint tensors that fill it together, and how each of them is cut over ranks."""

    parameter: nn.Parameter
    pieces: tuple[Piece, ...]
    shard: Placement


class Module(nn.Module):
    """A layer as one rank computes it.

    A subclass declares its `boundary`, as a class attribute or in its constructor where the axis is an
    argument; says with `linear` whether it passes a sum through; and yields its parts from `stages` in
    the order of the data flow. Nothing trains: parameters take no gradient.
    """

    boundary: Boundary | None = None
    linear: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._weights: list[Weight] = []

    def stages(self) -> Iterable[tuple[str, Module]]:
        """The parts in the order of the data flow, each under its name."""
        return ()

    def declare(
        self, ctx: BuildContext, shape: tuple[int, ...], pieces: Iterable[Piece], shard: Placement
    ) -> nn.Parameter:
        """A new, uninitialised parameter that the checkpoint tensors of `pieces` fill together.

        Raises `ConfigError` when there is no memory for it.
        """
        try:
            values = torch.empty(shape, dtype=ctx.dtype, device=ctx.device)
        except RuntimeError as error:
            dtype = str(ctx.dtype).removeprefix("torch.")
            raise ConfigError(
                f"no memory for {ctx.prefix}: {list(shape)} of {dtype} on {ctx.device}, the model is too large"
            ) from error
        parameter = nn.Parameter(values, requires_grad=False)
        self._weights.append(Weight(parameter, tuple(pieces), shard))
        return parameter

    def weights(self) -> Iterator[Weight]:
        """Every weight of this module and its parts, each once."""
        for module in self.modules():
            if isinstance(module, Module):
                yield from module._weights
