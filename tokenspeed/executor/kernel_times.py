"""What every kernel on the device took, as torch's profiler sees it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple, Self

import torch

STEP_BEGINS = "Memcpy HtoD"
"""How the profiler calls what every step begins with: its plan is copied to the device."""


class Span(NamedTuple):
    """Something that ran on the device, in microseconds."""

    start: float
    end: float
    name: str


def available() -> bool:
    """Whether there is a device whose kernels the profiler sees."""
    return torch.cuda.is_available()


def hold(cycles: int) -> None:
    """Keep the device from whatever is enqueued next for so many cycles of its clock: it then begins with all of it
    there, and waits for nobody."""
    torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]


class KernelTimes:
    """Records what runs on the device while it is entered. A kernel that begins before the one before it has ended
    counts its waiting too, so that the times may add up to more than the steps took."""

    def __init__(self) -> None:
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])

    def __enter__(self) -> Self:
        self._profile.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._profile.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def timeline(self, steps: int) -> str:
        """A row for each of the last `steps` whole steps; see `step_rows`."""
        spans = (
            Span(each.time_range.start, each.time_range.end, each.name)
            for each in self._profile.events() or ()  # type: ignore[no-untyped-call]
            if each.device_type == torch.profiler.DeviceType.CUDA
        )
        return step_rows(spans, steps)

    def table(self, steps: int) -> str:
        """A row a kernel, the longest first: launches and microseconds of each of `steps` steps."""
        found = [each for each in self._profile.key_averages() if each.self_device_time_total > 0]
        lines = ["| kernel | a step | µs each | µs a step |", "|---|---|---|---|"]
        for each in sorted(found, key=lambda each: -each.self_device_time_total):
            count, total = each.count / steps, each.self_device_time_total / steps
            lines.append(f"| {each.key[:60]} | {count:.1f} | {total / count:.2f} | {total:.1f} |")
        return "\n".join(lines)


def step_rows(spans: Iterable[Span], steps: int) -> str:
    """Of the last `steps` steps that a next one follows: from the first launch to the last end, the time in which
    anything ran, pauses inside, and the idle time before the next step. In microseconds."""
    ordered = sorted(spans)
    copies = [STEP_BEGINS in span.name for span in ordered]
    # Several copies in a row begin one step.
    begins = [index for index, copy in enumerate(copies) if copy and not (index and copies[index - 1])]
    lines = ["| step | from first to last | device runs | launches | pauses | longest pause | idle before the next |"]
    lines.append("|---|---|---|---|---|---|---|")
    for number, (first, following) in enumerate(list(itertools.pairwise(begins))[-steps:], 1):
        step = ordered[first:following]
        busy, pauses, reached = 0.0, [0.0], step[0].start
        for span in step:
            pauses.append(max(span.start - reached, 0.0))
            busy += max(span.end - max(span.start, reached), 0.0)
            reached = max(reached, span.end)
        idle = max(ordered[following].start - reached, 0.0)
        lines.append(
            f"| {number} | {reached - step[0].start:.1f} | {busy:.1f} | {len(step)} | {sum(pauses):.1f} | "
            f"{max(pauses):.1f} | {idle:.1f} |"
        )
    return "\n".join(lines)
