"""Where this process stands among the ranks of a model: by itself, or as a launcher says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from msgspec import structs

from tokenspeed.config import Parallel
from tokenspeed.errors import ConfigError
from tokenspeed.parallel.mesh import Mesh

NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables that torchrun, and every launcher that speaks its language, sets in each rank's environment."""


@dataclass(frozen=True, slots=True)
class Place:
    """One rank of `world`, the `local_rank`-th of `local_world` on its machine, and where all of them meet.

    `standing`: the launcher holds a store there, in which this start's names have that prefix.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    standing: str | None = None

    @classmethod
    def alone(cls) -> Self:
        """The one rank of an engine that has no other: it meets nobody."""
        return cls(0, 1, 0, 1, "", 0)

    @classmethod
    def launched(cls, environment: Mapping[str, str]) -> Self | None:
        """As a launcher says; None where none says anything, or nothing but that there is one rank.

        Raises `ConfigError` naming the variable that makes no sense.
        """
        if any(name not in environment for name in NAMES):
            return None
        rank, world, port = (_number(environment, name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        if world <= 1:
            return None
        if rank >= world:
            raise ConfigError(f"RANK={rank} in the environment, but WORLD_SIZE={world}")
        local_rank = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
        local_world = _number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else world
        standing = None
        if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            standing = f"tokenspeed/{environment.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        return cls(rank, world, local_rank, max(1, local_world), environment["MASTER_ADDR"], port, standing)


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment[name]
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"{name}={text!r} in the environment is no number")
    return int(text)


def over_launched(parallel: Parallel, environment: Mapping[str, str]) -> Parallel:
    """`parallel` over as many ranks as a launcher has started. `ConfigError` where another number was asked for."""
    place = Place.launched(environment)
    if place is None:
        return parallel
    if parallel.world not in (1, place.world):
        raise ConfigError(
            f"--tensor-parallel-size {parallel.world}, but the launcher has started WORLD_SIZE={place.world} ranks"
        )
    return structs.replace(parallel, world=place.world)


def served_mesh(parallel: Parallel, tps_floor: float | None = None) -> Mesh:
    """The mesh that an engine serves over, which promises streams this floor. Raises `ConfigError` naming the flags
    that cannot be."""
    mesh = Mesh.of(parallel.world, **parallel.sizes())
    groups, vocab = mesh.size("attn_data"), mesh.size("vocab")
    together = parallel.world // groups
    if groups > 1 and together % vocab:
        raise ConfigError(
            f"--vocab-tp-size {vocab} with --attn-dp-size {groups}: groups that attend to requests of their own also "
            f"score prompts on their own, so the vocabulary can be cut only over the {together} of a group, evenly"
        )
    if groups > 1 and tps_floor:
        raise ConfigError(
            f"--tps-floor {tps_floor:g} with --attn-dp-size {groups}: a prompt in one group delays the streams of all, "
            f"and no group knows the others' prompts; without the flag each group steers for its own streams"
        )
    return mesh
