"""What a step costs: links between ranks, memory bandwidth, and the work of modules.

Every constant is a named field with its source, so that a prediction can be recomputed by hand.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.layout import Layout
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.steps import (
    AllGather,
    AllReduce,
    AllToAll,
    Combine,
    Dispatch,
    GatherFeatures,
    ReduceScatter,
    Transfer,
)


@dataclass(frozen=True, slots=True)
class Work:
    """What a module does for a step on one rank: bytes of weights read and floating-point operations; of attention,
    bytes of KV cache for each token of context of each sequence, and operations for each pair of a query token and a
    token that it sees, in a decode row and in a prompt."""

    weight_bytes: float = 0.0
    flop: float = 0.0
    kv_bytes: float = 0.0
    decode_pair_flop: float = 0.0
    prompt_pair_flop: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in self.__slots__))


Positive = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True, slots=True)
class Link:
    """`seconds` of a collective that carries nothing; bytes a second that a rank sends while it receives as many."""

    seconds: Annotated[float, msgspec.Meta(ge=0)]
    bandwidth: Positive


LINKS = {
    # Sums of two H200 in a CUDA graph, without a norm: 7.1 to 8.4 µs for 4 to 64 KiB, 57 µs for 8 MiB. The line is
    # within 8% of each of them; a gather takes up to 3.5 µs longer.
    "nccl": Link(7.6e-6, 170e9),
    # The same machine, one kernel over shared memory, with residual and norm: 2.2 to 2.9 µs for 4 to 64 KiB, 33 µs for
    # 8 MiB; 292 GB/s from point to point.
    "symmetric": Link(2.5e-6, 292e9),
}
"""Between the GPUs of one machine, by what carries the collectives."""

FAR = Link(25e-6, 45e9)
"""Between machines: 400 Gb/s a GPU at nine tenths. Assumed, not measured."""


STREAM_BANDWIDTH = 3.15e12
"""Bytes a second of a read-only stream on an H100."""

SHARED_BYTES = 8 << 20
"""Of a message, up to which ranks of a machine reduce through memory that they share."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """One GPU of many.

    `near` joins the ranks of a machine, `far` machines of `ranks_per_machine` ranks each. `shared` is memory that the
    ranks of a machine have in common, through which a sum goes that has a norm behind it; None: it goes as others do.
    `stream_bandwidth` is what a kernel that only reads gets, `read_share` the share of it that the kernels of a step
    get, `block` what a block takes beside that: its kernels start one after the other.
    """

    near: Link = LINKS["nccl"]
    shared: Link | None = None
    far: Link = FAR
    ranks_per_machine: int = 8
    stream_bandwidth: float = STREAM_BANDWIDTH
    # These two together fit what decode steps of DeepSeek-V2-Lite's shape take on one H200 (docs/parallel.md).
    read_share: float = 0.9
    block: float = 12e-6
    flop_rate: float = 5.3e14  # two thirds of cuBLAS's 800 TFLOP/s in bfloat16
    kernel: float = 1.45e-6  # the smallest kernel inside a CUDA graph

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second that the kernels of a step read."""
        return self.read_share * self.stream_bandwidth

    def sent(
        self, transfer: Transfer, layout: Layout, mesh: Mesh, tokens: int, row_bytes: int, fan_out: int = 0
    ) -> int:
        """Bytes that a rank sends for a tensor of `tokens` tokens over all ranks, `row_bytes` each, that lies so."""
        near, far = self._volumes(transfer, layout, mesh, tokens, row_bytes, fan_out)
        return round(near + far)

    def seconds(
        self, transfer: Transfer, layout: Layout, mesh: Mesh, tokens: int, row_bytes: int, fan_out: int = 0
    ) -> float:
        """How long it takes. A slice is a view, and takes no time."""
        near, far = self._volumes(transfer, layout, mesh, tokens, row_bytes, fan_out)
        time = 0.0
        if near:
            time += self.near.seconds + near / self.near.bandwidth
        if far:
            time += self.far.seconds + far / self.far.bandwidth
        return time

    def reduced_seconds(self, transfer: AllReduce, layout: Layout, mesh: Mesh, tokens: int, row_bytes: int) -> float:
        """How long an all-reduce takes that has a norm behind it, without the norm."""
        seconds = self.seconds(transfer, layout, mesh, tokens, row_bytes)
        near, far = self._volumes(transfer, layout, mesh, tokens, row_bytes, 0)
        if self.shared is None or far or local_rows(tokens, layout, mesh) * row_bytes > SHARED_BYTES:
            return seconds
        return min(seconds, self.shared.seconds + near / self.shared.bandwidth)

    def norm_seconds(self, rows: int, row_bytes: int, *, fused: bool) -> float:
        """A norm reads x and residual and writes both. Fused behind an all-reduce it is no kernel of its own, and x
        is in registers already."""
        passes = 2 if fused else 4
        return (0.0 if fused else self.kernel) + passes * rows * row_bytes / self.memory_bandwidth

    def work_seconds(self, work: Work, tokens: int, sequences: int, context: int) -> float:
        """A module's own time for `tokens` new tokens of `sequences` sequences that have `context` tokens each already.
        The slower of memory and arithmetic, behind the start of the kernels."""
        new = tokens / sequences
        pairs = tokens * (context + (new + 1) / 2)
        pair_flop = work.decode_pair_flop if new <= 1 else work.prompt_pair_flop
        read = work.weight_bytes + work.kv_bytes * sequences * (context + new)
        return self.block + max(read / self.memory_bandwidth, (work.flop + pair_flop * pairs) / self.flop_rate)

    def _volumes(
        self, transfer: Transfer, layout: Layout, mesh: Mesh, tokens: int, row_bytes: int, fan_out: int
    ) -> tuple[float, float]:
        """Bytes that a rank sends within its machine and between machines.

        Of v bytes that each of n ranks ends or begins with, a gather or a scatter sends (n − 1)/n · v; with l ranks a
        machine and m machines, (l − 1)/l · v near and (m − 1)/m · v/l far. An all-reduce is both, one after the other.
        """
        sets = mesh.atom_sets(transfer.first, transfer.stop)
        size = len(sets[0])
        machines = max(len({rank // self.ranks_per_machine for rank in ranks}) for ranks in sets)
        local = math.ceil(size / machines)
        rows = local_rows(tokens, layout, mesh)
        held = rows * row_bytes / layout.ranks(mesh, "S")
        match transfer:
            case AllGather() | GatherFeatures():
                volume = held * size
            case AllReduce():
                volume = 2 * held
            case ReduceScatter():
                volume = held / rows * size * math.ceil(rows / size)
            case AllToAll():
                return held * (local - 1) / size, held * (size - local) / size
            case Dispatch() | Combine():
                divided = layout if isinstance(transfer, Dispatch) else transfer.applied(layout)
                asked = size * (1.0 - (1.0 - 1.0 / size) ** fan_out)  # distinct ranks of `fan_out` random ones
                each = local_rows(tokens, divided, mesh) * row_bytes * asked / size
                return each * (local - 1), each * (size - local)
            case _:
                return 0.0, 0.0
        return volume * (local - 1) / local, volume / local * (machines - 1) / machines


BOTH = "both"
"""What an engine has on the GPUs of one machine: NCCL, and memory that they share."""

KINDS = {
    BOTH: Hardware(shared=LINKS["symmetric"]),
    "nccl": Hardware(near=LINKS["nccl"]),
    "symmetric": Hardware(near=LINKS["symmetric"]),
}
"""What may carry the collectives, by name."""


def hardware(links: str, ranks_per_machine: int, stream_bandwidth: float | None = None) -> Hardware:
    """The hardware of these links: one of `KINDS`, or a file that `python -m tokenspeed.parallel measure` has written.
    `stream_bandwidth` None is what the file says, or else an H100's. Raises `ConfigError` naming the file."""
    known = KINDS.get(links)
    if known is None:
        try:
            measured = msgspec.json.decode(Path(links).read_bytes(), type=Measured)
        except OSError as error:
            raise ConfigError(f"--links {links}: none of {', '.join(KINDS)}, and {error.strerror or error}") from error
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{links}: {error}") from error
        known = Hardware(
            near=measured.near,
            shared=measured.shared,
            stream_bandwidth=measured.stream_bandwidth or STREAM_BANDWIDTH,
        )
    return dataclasses.replace(
        known, ranks_per_machine=ranks_per_machine, stream_bandwidth=stream_bandwidth or known.stream_bandwidth
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """What `measure` finds out and `hardware` reads: as in `Hardware`. `stream_bandwidth` None: nobody measured it."""

    near: Link
    shared: Link | None
    stream_bandwidth: Positive | None = None


def local_rows(tokens: int, layout: Layout, mesh: Mesh) -> int:
    """The rows that a rank holds of `tokens` tokens over all ranks, padded to equal parts."""
    return math.ceil(tokens / layout.ranks(mesh, "V"))
