"""A compiled program as text, and predictions as a table."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

from tokenspeed.parallel.cost import Hardware
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.program import Program
from tokenspeed.parallel.steps import Add, AllReduceNorm, Copy, Norm, Planned, Run, Select, Transfer, X

LAYER = re.compile(r"^(.*?\.)(\d+)\.")
"""The part of a module's path that counts layers."""

Line = tuple[str, str, str, str]
"""What happens, between whom, bytes sent, microseconds."""


def described(hardware: Hardware, mesh: Mesh) -> str:
    """The assumptions of a prediction in a line."""
    near, far = hardware.near, hardware.far
    told = (
        f"links: {near.seconds * 1e6:g} µs + bytes / {near.bandwidth / 1e9:g} GB/s within a machine of "
        f"{hardware.ranks_per_machine} ranks"
    )
    if hardware.shared is not None:
        told += f"; sums with a norm behind {hardware.shared.seconds * 1e6:g} µs"
    if mesh.world > hardware.ranks_per_machine:
        told += f", {far.seconds * 1e6:g} µs + bytes / {far.bandwidth / 1e9:g} GB/s between machines"
    memory, arithmetic = hardware.memory_bandwidth / 1e12, hardware.flop_rate / 1e12
    return f"{told}; memory {memory:.2f} TB/s, arithmetic {arithmetic:g} TFLOP/s, {hardware.block * 1e6:g} µs a block"


def explain(program: Program) -> Iterator[str]:
    """The program, a line a step, equal neighbouring layers once. Bytes are what a rank sends, times are predicted."""
    sampled = f", {program.rows} sampled from" if program.rows != program.tokens else ""
    yield f"a step of {program.tokens} tokens{sampled}{', captured' if program.captured else ''}"
    name = program.chain.name
    groups = [(index, [_line(planned, program.mesh, name) for planned in steps]) for index, steps in _layers(program)]
    for (outside, lines), run in itertools.groupby(groups, key=_alike):
        layers = [index for index, _ in run]
        if not outside:
            same = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}, each"
            yield f"  {same}:"
        yield from (_aligned(line, indent=2 if outside else 4) for line in lines)
    sent, seconds = (sum(getattr(each, field) for each in program.transfers()) for field in ("sent", "seconds"))
    count = sum(1 for each in program.transfers() if each.seconds)
    yield f"  in all {count} transfers, {size(sent)} sent by a rank, {seconds * 1e3:.2f} ms"


def predictions(programs: Iterable[Program], context: int) -> Iterator[str]:
    """Decode steps of several batch sizes as a table."""
    yield f"decode with {context:,} tokens of context, predicted (without sampler and host):"
    yield _row("batch", "modules ms", "norms ms", "transfers ms", "step ms", "tok/s each", "tok/s in all")
    for program in programs:
        time = program.timing(context)
        parts = (f"{seconds * 1e3:.2f}" for seconds in (time.modules, time.norms, time.transfers, time.total))
        yield _row(str(program.tokens), *parts, f"{1 / time.total:,.0f}", f"{program.tokens / time.total:,.0f}")


def size(num_bytes: float) -> str:
    """For people: 12.3 kB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            break
        num_bytes /= 1000
    return f"{num_bytes:,.0f} B" if unit == "B" else f"{num_bytes:,.1f} {unit}"


def _alike(group: tuple[int | None, list[Line]]) -> tuple[bool, list[Line]]:
    return group[0] is None, group[1]


def _row(*cells: str) -> str:
    return "  " + "  ".join(cell.rjust(12) for cell in cells)


def _aligned(line: Line, *, indent: int) -> str:
    what, between, sent, micros = line
    return f"{' ' * indent}{what:<{64 - indent}}{between:<26}{sent:>10}{micros:>12}".rstrip()


def _layers(program: Program) -> Iterator[tuple[int | None, Sequence[Planned]]]:
    """The steps by layer; what moves a tensor belongs to what it leads to. None: outside of layers."""
    numbered: list[tuple[int | None, Planned]] = []
    number: int | None = None
    for planned in reversed(program.steps):
        path = getattr(planned.step, "term", getattr(planned.step, "module", None))
        if path is not None:
            found = LAYER.match(path)
            number = None if found is None else int(found[2])
        numbered.append((number, planned))
    for index, steps in itertools.groupby(reversed(numbered), key=lambda one: one[0]):
        yield index, [planned for _, planned in steps]


def _line(planned: Planned, mesh: Mesh, name: str) -> Line:
    step, between = planned.step, ""
    match step:
        case Run():
            what = _short(step.module, name) + ("" if step.tensor == X else "  (beside)")
        case Norm():
            what = _short(step.module, name)
        case AllReduceNorm():
            what = f"  all-reduce, then {_short(step.module, name)} in one"
            between = _between(mesh, step.first, step.stop)
        case Copy():
            what = f"  keep x for {_short(step.to, name)}"
        case Add():
            what = f"  add what {_short(step.term, name)} gave"
        case Select():
            what = "  keep the tokens that are sampled from"
        case Transfer():
            what = f"  {step.verb}" + ("" if step.tensor == X else f" of {_short(step.tensor, name)}")
            between = _between(mesh, step.first, step.stop)
    sent = size(planned.sent) if planned.sent else ""
    return what, between, sent, f"{planned.seconds * 1e6:.1f} µs" if planned.seconds else ""


def _short(path: str, name: str) -> str:
    inside = LAYER.match(path)
    return path[inside.end() :] if inside else path.removeprefix(f"{name}.")


def _between(mesh: Mesh, first: int, stop: int) -> str:
    """The ranks of one set, and how many such sets there are."""
    sets = mesh.atom_sets(first, stop)
    ranks = sets[0]
    told = ", ".join(map(str, ranks)) if len(ranks) <= 4 else f"{ranks[0]}, {ranks[1]}, … {ranks[-1]}"
    return f"ranks {told}" + (f"  (× {len(sets)})" if len(sets) > 1 else "")
