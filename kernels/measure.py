"""`bench`: the time of a call, the bytes a second that it means, and how near that is to the device's limit."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tokenspeed.kernels.numerics.case import Arguments, copied
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Kernel, KernelError, Target, Traits
from tokenspeed.kernels.selection import Selector
from tokenspeed.kernels.workloads import num_bytes, traits_of, workload_of

CPU_CACHE = 64 << 20
"""Bytes of a CPU's caches: one call's arguments must not be there from the call before the last."""

CPU_STREAM = 512 << 20
"""Bytes of what is read and copied to say what a CPU's memory gives; a GPU's are eight times as many."""

PRODUCTS = 800e12
"""Operations a second of large 16-bit matrix products on a Hopper: what arithmetic gives at most there."""

MOST_COPIES = 32
SECONDS = 0.3
"""Time spent on measuring one kernel, warm-up aside."""


@dataclass(frozen=True)
class Measurement:
    """One implementation on one shape. `seconds` a call, the median; `moved` bytes; `flop` where products may be the
    limit."""

    name: str
    chosen: bool
    seconds: float
    moved: float
    flop: float | None


def copies(arguments: Arguments, device: torch.device) -> list[Arguments]:
    """The arguments as often as it takes to fill the caches twice, so that weights and KV come from memory."""
    cache = CPU_CACHE if device.type == "cpu" else torch.cuda.get_device_properties(device).L2_cache_size
    count = min(MOST_COPIES, 1 + -(-2 * cache // max(1, num_bytes(arguments))))
    return [arguments, *(copied(arguments, device) for _ in range(count - 1))]


def seconds_a_call(kernel: Kernel, data: Sequence[Arguments], device: torch.device) -> float:
    """The median over rounds of all `data`. On a GPU a round is a CUDA graph, as a decode step is, or the calls one
    after another where something in the kernel waits for the device. Raises `KernelError` for what a kernel refuses."""
    try:
        _each(kernel, data[:2])  # compiles, allocates
    except (IndexError, ValueError) as error:
        raise KernelError(f"no call has these sizes: {error}") from error
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    kernel(*data[-1])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    data = data[: max(1, int(SECONDS / (time.perf_counter() - begun)))]
    if device.type == "cpu":
        return statistics.median(_cpu_rounds(lambda: _each(kernel, data))) / len(data)
    return statistics.median(_gpu_rounds(_captured(kernel, data) or (lambda: _each(kernel, data)))) / len(data)


def _each(kernel: Kernel, data: Sequence[Arguments]) -> None:
    for arguments in data:
        kernel(*arguments)


def _cpu_rounds(run: Callable[[], None]) -> Iterator[float]:
    begun = time.perf_counter()
    now = begun
    while now - begun < SECONDS:
        before = now
        run()
        now = time.perf_counter()
        yield now - before


def _gpu_rounds(run: Callable[[], None]) -> Iterator[float]:
    begun = time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        start, end = _event(), _event()
        start.record()
        run()
        end.record()
        end.synchronize()
        yield start.elapsed_time(end) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _captured(kernel: Kernel, data: Sequence[Arguments]) -> Callable[[], None] | None:
    graph = torch.cuda.CUDAGraph()
    with contextlib.suppress(RuntimeError):  # torch refuses to capture what waits for the device
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a kernel may have a thread of its own
            _each(kernel, data)
        return graph.replay
    torch.cuda.synchronize()
    return None


def memory_rate(device: torch.device) -> float:
    """Bytes a second of memory, what it gives at most: of a sum, which only reads, or of a copy, whichever moves more.
    (In a CUDA graph a copy of an H200 reaches 2.7 TB/s, where kernels that read reach 4.5.)"""
    size = CPU_STREAM if device.type == "cpu" else 8 * CPU_STREAM
    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    read = size / seconds_a_call(torch.sum, [(source,)], device)
    return max(read, 2 * size / seconds_a_call(torch.Tensor.copy_, [(torch.empty_like(source), source)], device))


def measured(
    selector: Selector, op: str, target: Target, sizes: Traits, device: torch.device
) -> Iterator[Measurement]:
    """Every implementation that may run, by priority. Raises `KernelError` when none may."""
    workload = workload_of(op)
    traits = traits_of(op, sizes)
    explanation = selector.choose(op, target, traits)
    data = copies(workload.arguments(sizes, target.dtype, device), device)
    for verdict in explanation.verdicts:
        if verdict.reasons:
            continue
        kernel = verdict.implementation.bind(target, traits)
        seconds = seconds_a_call(kernel, data, device)
        moved = workload.moved(sizes, data[0], kernel(*data[0]))
        flop = None if workload.flop is None else workload.flop(sizes, data[0])
        yield Measurement(verdict.implementation.name, explanation.runs(verdict), seconds, moved, flop)


def bench(
    selector: Selector, op: str, shapes: Sequence[Traits], dtype: torch.dtype, device: torch.device
) -> Iterator[str]:
    """The lines of the table, each when it is known. `shapes` give sizes that differ from the workload's own."""
    workload = workload_of(op)
    target = Target(Platform.of(device), dtype)
    every = [workload.sizes(shape) for shape in shapes]
    for sizes in every:
        selector.choose(op, target, traits_of(op, sizes))
    rate = memory_rate(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(target.platform)
    yield f"{op}, {str(dtype).removeprefix('torch.')}, on {name}; memory gives {rate / 1e9:.0f} GB/s"
    peak = PRODUCTS if target.platform.arch == "sm90" and dtype is not torch.float32 else None
    yield f"{'':2}{'implementation':18}{'µs':>10}{'GB/s':>9}{'of limit':>10}{'TFLOP/s':>9}{'of 800':>8}  sizes"
    for sizes in every:
        shape = " ".join(f"{name}={value}" for name, value in sizes.items())
        for line in measured(selector, op, target, sizes, device):
            per_second = line.moved / line.seconds
            yield (
                f"{'*' if line.chosen else '':2}{line.name:18}{line.seconds * 1e6:10.1f}{per_second / 1e9:9.1f}"
                f"{per_second / rate:10.1%}{_products(line, peak)}  {shape}"
            )


def _products(line: Measurement, peak: float | None) -> str:
    """Two columns, with a dash where there is nothing to say."""
    if line.flop is None:
        return f"{'–':>9}{'–':>8}"
    rate = line.flop / line.seconds
    return f"{rate / 1e12:9.2f}" + (f"{'–':>8}" if peak is None else f"{rate / peak:8.1%}")
