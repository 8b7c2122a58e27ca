"""What collectives take between the ranks of this machine, and how fast a GPU reads its memory: processes that check
and time them, and constants for predictions."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from tokenspeed.errors import ConfigError, InvariantBroken
from tokenspeed.kernels import ops
from tokenspeed.kernels.platform import Platform
from tokenspeed.parallel.collectives import ReducedNorm
from tokenspeed.parallel.cost import SHARED_BYTES, Link, Measured
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.steps import AllGather, AllReduce, AllToAll, GatherFeatures, ReduceScatter, Slice, Transfer, X
from tokenspeed.parallel.world import Member, World

HIDDEN = 2048
SIZES = tuple(4096 << shift for shift in range(0, 14, 2))
"""Bytes that a rank has before a collective, 4 KiB to 16 MiB."""

ADDRESS, JOIN_SECONDS, PATIENCE = "127.0.0.1", 60.0, 300.0
REPEATS, CALLS = 10, 20
"""Of a time the least is taken of so many repeats, each of so many calls one after the other, on a GPU in one graph."""

STREAM_BYTES = 4 << 30
"""What a GPU reads to show its bandwidth: far more than its cache holds."""

STREAM = "read-only stream"
FUSED, ALONE = "all-reduce, norm in one", "all-reduce, then norm"

T = TypeVar("T")

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """One collective at one size: seconds on the slowest rank, and the bytes that a rank sends; or a stream of `size`
    bytes that each rank reads from its own memory."""

    what: str
    size: int
    sent: float
    seconds: float


def collectives(world: int, device: str) -> Iterator[Timing]:
    """Check and time each collective over `world` ranks of this machine, and on GPUs a stream of each one's memory.
    Raises `ConfigError` as `started` does, and for one rank, which sends nothing."""
    if world < 2:
        raise ConfigError(f"--world {world}: collectives are between two ranks and more")
    stream = STREAM_BYTES if device == "cuda" else 0
    for of_ranks in started(Mesh.of(world), device, timings, SIZES, stream):
        yield max(of_ranks, key=lambda timing: timing.seconds)


def started(mesh: Mesh, device: str, job: Callable[..., Iterator[T]], *arguments: object) -> Iterator[list[T]]:
    """Start a process for each rank of `mesh`, let it run `job(world, *arguments)`, and end them: what they yield,
    together. The job is a function of a module, what it is given and yields is what pickle takes.

    Raises `ConfigError` where there are fewer GPUs, or a rank fails, with what it said.
    """
    if device == "cuda" and torch.cuda.device_count() < mesh.world:
        raise ConfigError(f"--world {mesh.world} needs as many GPUs, but torch finds {torch.cuda.device_count()}")
    with socket.create_server((ADDRESS, 0)) as server:
        port = server.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    here, there = zip(*(context.Pipe() for _ in range(mesh.world)), strict=True)
    processes = [
        context.Process(target=_rank, args=(mesh, rank, device, port, end, job, arguments), daemon=True)
        for rank, end in enumerate(there)
    ]
    for process, end in zip(processes, there, strict=True):
        process.start()
        end.close()
    try:
        while True:
            told = [_heard(end, rank) for rank, end in enumerate(here)]
            if any(each is None for each in told):
                return
            yield [each[0] for each in told if each is not None]
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def _heard(end: Connection, rank: int) -> Any:
    """What a rank yields, in a tuple; None at its end."""
    if not end.poll(PATIENCE):
        raise ConfigError(f"rank {rank} has said nothing for {PATIENCE:g} s")
    try:
        told = end.recv()
    except EOFError:
        told = "it died without a word"
    if isinstance(told, str):
        raise ConfigError(f"rank {rank} failed: {told}")
    return told


def table(measured: Sequence[Timing]) -> Iterator[str]:
    """Microseconds, a row a collective, a column a size."""
    yield f"{'µs at KiB a rank':<26}" + "".join(f"{size // 1024:>9}" for size in SIZES)
    for what, group in itertools.groupby(measured, key=lambda timing: timing.what):
        by_size = {timing.size: f"{timing.seconds * 1e6:>9.1f}" for timing in group}
        if by_size.keys() & set(SIZES):
            yield f"{what:<26}" + "".join(by_size.get(size, " " * 9) for size in SIZES)


def fitted(measured: Sequence[Timing]) -> Measured:
    """Links for predictions, each the line through its smallest and its largest message; shared memory counts only
    where it is faster. Memory as fast as the slowest rank streams it, where that was measured."""
    fused, alone = (
        min((each for each in measured if each.what == what), key=lambda timing: timing.size)
        for what in (FUSED, ALONE)
    )
    shared = _line(each for each in measured if each.what == FUSED and each.size <= SHARED_BYTES)
    return Measured(
        _line(each for each in measured if each.what == AllGather.verb),
        shared if fused.seconds < 0.9 * alone.seconds else None,
        next((each.size / each.seconds for each in measured if each.what == STREAM), None),
    )


def _line(found: Iterable[Timing]) -> Link:
    points = sorted(found, key=lambda timing: timing.sent)
    least, most = points[0], points[-1]
    bandwidth = (most.sent - least.sent) / max(most.seconds - least.seconds, 1e-9)
    return Link(max(least.seconds - least.sent / bandwidth, 1e-9), bandwidth)


def write_links(path: Path, found: Measured) -> None:
    """For `--links`. Raises `ConfigError` naming a file that cannot be written."""
    try:
        path.write_bytes(msgspec.json.encode(found) + b"\n")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def _rank(
    mesh: Mesh,
    rank: int,
    kind: str,
    port: int,
    end: Connection,
    job: Callable[..., Iterator[Any]],
    arguments: tuple[Any, ...],
) -> None:
    """One process: each thing that the job yields in a tuple, then None; or what went wrong."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // mesh.world))
    try:
        world = World.join(mesh, rank, device, address=ADDRESS, port=port, timeout=JOIN_SECONDS)
        with torch.inference_mode():
            for found in job(world, *arguments):
                end.send((found,))
        world.least(0)
        world.leave()
        end.send(None)
    except (ConfigError, InvariantBroken, RuntimeError) as error:  # torch's word for what fails on a device
        end.send(" ".join(str(error).split()))


def timings(world: World, sizes: Sequence[int] = SIZES, stream: int = 0) -> Iterator[Timing]:
    """Check and time each collective over all ranks of `world` at each of these sizes that is a row or more for every
    rank, then a read of `stream` bytes if there are any. Raises `InvariantBroken` naming the one that is wrong."""
    transfers = [kind(X, 0, 1) for kind in (AllGather, AllReduce, ReduceScatter, GatherFeatures, AllToAll)]
    dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
    target = ops.Target(Platform.of(world.device), dtype)
    num_ranks = world.mesh.world
    fused = world.collectives.all_reduce_norm(0, 1, target, HIDDEN)
    reduce, norm = world.collectives.move(AllReduce(X, 0, 1)), ops.rms_norm(target)

    def one_by_one(
        x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return norm(reduce(x), weight, eps, residual)

    for transfer in transfers:
        move = world.collectives.move(transfer)
        for size in sizes:
            parts = _parts(size, dtype, num_ranks, world.device)
            uneven = len(parts[0]) % num_ranks and isinstance(transfer, ReduceScatter | AllToAll)
            if not len(parts[0]) or uneven:
                continue
            own = parts[world.rank]
            _check(transfer, move(own), parts, world.rank)
            seconds = seconds_of(world, partial(move, own))
            yield Timing(transfer.verb, size, _sent(transfer, size, num_ranks), seconds)
    for what, reduced in ((FUSED, fused), (ALONE, one_by_one)):
        for size in sizes:
            parts = _parts(size, dtype, num_ranks, world.device)
            if not len(parts[0]):
                continue
            own = parts[world.rank]
            _check_norm(what, reduced, parts, world.rank)
            weight, residual = own.new_ones(HIDDEN), torch.zeros_like(own)
            seconds = seconds_of(world, partial(reduced, own, weight, 1e-6, residual))
            yield Timing(what, size, _sent(AllReduce(X, 0, 1), size, num_ranks), seconds)
    tokens = torch.zeros(256, dtype=torch.int32, device=world.device)
    yield Timing("share", sizes[0], float(tokens.nbytes), seconds_of(world, partial(world.share, tokens)))
    if stream:
        yield Timing(STREAM, stream, 0.0, _stream_seconds(world, stream))


def _stream_seconds(world: World, num_bytes: int) -> float:
    """The better of two sums over as many bytes: to one number, and to one of every run."""
    data = torch.zeros(num_bytes // 4, dtype=torch.float32, device=world.device)
    runs = data.view(math.gcd(len(data), 1 << 14), -1)
    return min(seconds_of(world, call) for call in (partial(torch.sum, data), partial(torch.sum, runs, 1)))


def _parts(size: int, dtype: torch.dtype, num_ranks: int, device: torch.device) -> list[torch.Tensor]:
    """What each rank has: rows of small whole numbers, whose sums are exact in any order."""
    rows = size // (HIDDEN * dtype.itemsize)
    generator = torch.Generator().manual_seed(size)
    return [torch.randint(-8, 9, (rows, HIDDEN), generator=generator).to(device, dtype) for _ in range(num_ranks)]


def _check(transfer: Transfer, got: torch.Tensor, parts: list[torch.Tensor], rank: int) -> None:
    size = len(parts)
    total = torch.stack(parts).sum(0)
    match transfer:
        case AllGather():
            want = torch.cat(parts)
        case GatherFeatures():
            want = torch.cat(parts, 1)
        case AllReduce():
            want = total
        case ReduceScatter():
            want = total.chunk(size)[rank]
        case AllToAll():
            want = torch.cat([part.chunk(size)[rank] for part in parts], 1)
        case _:
            raise InvariantBroken(f"nobody has written down what {transfer.verb} gives")
    if not torch.equal(got, want):
        raise InvariantBroken(f"{transfer.verb} of {parts[0].nbytes} bytes gives rank {rank} something else")


def _check_norm(what: str, reduced: ReducedNorm, parts: list[torch.Tensor], rank: int) -> None:
    """Several calls, as the kernel takes turns with two halves of its memory."""
    weight, total = parts[0].new_ones(HIDDEN), torch.stack(parts).float().sum(0)
    want = total * torch.rsqrt(total.square().mean(1, keepdim=True) + 1e-6)
    for residual in (None, torch.zeros_like(parts[0]), torch.zeros_like(parts[0])):
        y, r = reduced(parts[rank], weight, 1e-6, residual)
        if not torch.equal(r.float(), total) or (y.float() - want).abs().max() > 0.02:
            raise InvariantBroken(f"{what} of {parts[0].nbytes} bytes gives rank {rank} something else")


def _sent(transfer: Transfer, size: int, num_ranks: int) -> float:
    """Bytes that a rank sends of `size` that it has."""
    match transfer:
        case AllReduce():
            return 2 * size * (num_ranks - 1) / num_ranks
        case AllGather() | GatherFeatures():
            return float(size * (num_ranks - 1))
        case Slice():
            return 0.0
    return size * (num_ranks - 1) / num_ranks


def seconds_of(world: Member, call: Call, calls: int = CALLS) -> float:
    """The least time of a call on this rank, the ranks having begun together; on a GPU in a graph of so many calls."""
    for _ in range(3):
        call()
    if world.device.type != "cuda":
        return min(_timed(world, call, 3) for _ in range(REPEATS // 2))
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(calls):
            call()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        world.least(0)
        graph.replay()  # the ranks meet in the first
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3 / calls)
    return min(times)


def _timed(world: Member, call: Call, calls: int) -> float:
    world.least(0)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls
