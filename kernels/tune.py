"""`tune`: time what may run, by number of tokens, and keep the fastest for selection to take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tokenspeed.kernels.measure import copies, seconds_a_call
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Implementation, KernelError, Target, Traits, TraitValue
from tokenspeed.kernels.selection import Selector
from tokenspeed.kernels.winners import Winner, Winners, num_tokens
from tokenspeed.kernels.workloads import traits_of, workload_of

BATCHES: dict[str, tuple[int, ...]] = {
    "new": (16, 128, 512, 2048),
    "rows": (1, 8, 32, 128),
    "tokens": (1, 8, 32, 128, 512, 2048),
}
"""What is measured where the number of tokens is left open."""

MARGIN = 1.03
"""How much slower the implementation of higher priority may be and still be kept: measurements differ by so much."""


def tune(
    selector: Selector, winners: Winners, op: str, shapes: Sequence[Traits], dtype: torch.dtype, device: torch.device
) -> Iterator[str]:
    """The lines of the table, each when it is known; the winners are kept as soon as all shapes of the same traits
    are through. Times of sizes that are no traits are added up. Raises `KernelError` where nothing may run."""
    workload, target = workload_of(op), Target(Platform.of(device), dtype)
    batch = workload.batch
    if not all(batch in shape for shape in shapes):
        shapes = [{batch: most, **shape} for shape in shapes for most in BATCHES[batch]]
    groups: dict[str, list[dict[str, TraitValue]]] = {}
    for sizes in map(workload.sizes, shapes):
        groups.setdefault(str(traits_of(op, sizes)), []).append(sizes)
    for members in groups.values():
        traits = traits_of(op, members[0])
        explanation = selector.explain(op, target, traits, forced={})
        candidates = [verdict.implementation for verdict in explanation.verdicts if not verdict.reasons]
        if not candidates:
            raise KernelError(explanation.refusal())
        found: list[Winner] = []
        for most in sorted({int(sizes[batch]) for sizes in members}):
            tokens, times = _times(op, candidates, [each for each in members if each[batch] == most], target, device)
            winner = _winner(candidates, times)
            found.append(Winner(tokens, winner.name))
            listed = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in times.items())
            yield f"{batch}={most}: {winner.name} of {listed} µs"
        path = winners.put(op, target, traits, merged(found))
        yield f"{' '.join((op, *(f'{name}={value}' for name, value in traits.items())))}: kept in {path}"


def _times(
    op: str, candidates: Sequence[Implementation], bucket: Sequence[Traits], target: Target, device: torch.device
) -> tuple[int, dict[str, float]]:
    """Tokens of a call, and the seconds that each candidate needs for one call of each shape."""
    workload, tokens = workload_of(op), 0
    times = {candidate.name: 0.0 for candidate in candidates}
    for sizes in bucket:
        data = copies(workload.arguments(sizes, target.dtype, device), device)
        tokens = num_tokens(data[0])
        for candidate in candidates:
            kernel = candidate.bind(target, traits_of(op, sizes))
            times[candidate.name] += seconds_a_call(kernel, data, device)
    return tokens, times


def _winner(candidates: Sequence[Implementation], times: dict[str, float]) -> Implementation:
    """The first by priority that is about as fast as the fastest."""
    return next(each for each in candidates if times[each.name] <= MARGIN * min(times.values()))


def merged(found: Sequence[Winner]) -> list[Winner]:
    """Neighbouring buckets of one winner as one; the last has no end."""
    kept: list[Winner] = []
    for winner in found:
        if kept and kept[-1].name == winner.name:
            kept.pop()
        kept.append(winner)
    kept[-1] = Winner(None, kept[-1].name)
    return kept
