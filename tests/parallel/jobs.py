"""What ranks do in tests of the world and its collectives, each function in a process of a `Pool`."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import torch

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.measure import Timing, timings
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.steps import Transfer
from tokenspeed.parallel.world import World


def moved(world: World, transfers: list[Transfer], parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank has after each of these transfers of what it is given."""
    return [world.collectives.move(transfer)(parts[world.rank].clone()) for transfer in transfers]


def asked(world: World, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, held: int) -> torch.Tensor:
    """Tokens to the ranks that hold what they ask for, where each of them is weighed by what it asked, and back."""
    own = [part[world.rank] for part in (x, ids, weights)]
    exchange = world.collectives.exchange(0, 1)
    sent = exchange.dispatch(*own, held)
    first = world.rank * held
    here = (sent.ids >= first) & (sent.ids < first + held)
    assert here.any(1).all(), "a token came to a rank that it asked nothing of"
    answers = sent.x * (torch.where(here, sent.weights * (sent.ids + 1), 0.0)).sum(1, keepdim=True)
    return exchange.combine(answers, sent, len(own[0]))


def agreed(world: World) -> dict[str, object]:
    """The least of the ranks' numbers, what was shared and told, and what `same` says of equal and of other values."""
    world.same("--equal", "α" * 300)
    try:
        world.same("--other", f"value {min(world.rank, 1)}")
        said = ""
    except ConfigError as error:
        said = str(error)
    shared = torch.full((3,), world.rank + 1)
    everyones = world.share(shared).tolist()
    return {
        "least": (world.least(10 - world.rank), world.least_by_group(10 - world.rank)),
        "shared": (shared.tolist(), everyones),
        "told": world.told(b"of rank %d" % world.rank),
        "place": (world.num_groups, world.group, world.decides),
        "said": said,
    }


def heard(world: World, messages: list[bytes]) -> list[bytes]:
    """Rank 0 sends these while all ranks meet in collectives; what each of the others receives, in order."""
    got: list[bytes] = []

    def talk() -> None:
        for message in messages:
            if world.rank == 0:
                world.send(message)
            else:
                got.append(world.receive())

    thread = threading.Thread(target=talk)
    thread.start()
    for number in range(5):
        assert world.least(number + world.rank) == number
    thread.join()
    return got


def left(world: World) -> str:
    """Rank 0 leaves while the others wait for what it sends: what ends their wait."""
    if world.rank == 0:
        world.least(0)
        time.sleep(0.2)
        world.leave()
        world.leave()
        return ""
    world.least(0)
    try:
        world.receive()
    except EOFError as error:
        return str(error)
    return "a message"


def bereaved(world: World) -> str:
    """Rank 1 dies where rank 0 waits for it: what rank 0 is told, and that it can leave."""
    world.least(0)
    if world.rank:
        os._exit(1)
    try:
        world.least(0)
    except RuntimeError as error:
        world.leave()
        return str(error)
    return "a number"


def timed(world: World, sizes: Sequence[int], stream: int) -> list[Timing]:
    """What `measure` finds on this rank."""
    return list(timings(world, sizes, stream))


def joined(mesh: Mesh, rank: int, port: int, timeout: float) -> str:
    """What one rank is told that tries to join."""
    try:
        World.join(mesh, rank, torch.device("cpu"), address="127.0.0.1", port=port, timeout=timeout).leave()
    except ConfigError as error:
        return str(error)
    return ""
