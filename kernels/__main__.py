"""What kernels there are, which would run here and why, whether they are right, and how fast they are."""

from __future__ import annotations

import argparse
import itertools
import logging
import signal
import sys
from collections.abc import Iterator, Sequence

import torch

from tokenspeed.kernels.measure import bench
from tokenspeed.kernels.numerics import suite
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import OPS, Implementation, KernelError, Target, TraitValue
from tokenspeed.kernels.selection import Selector, default
from tokenspeed.kernels.tune import tune
from tokenspeed.kernels.winners import Winners

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 1 with one line on standard error when something is refused, and 1 when the
    numerics suite finds an error that is too large."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if options.command == "numerics":
            return _numerics(options)
        for line in _lines(options):
            print(line, flush=True)
    except (KernelError, RuntimeError) as error:  # RuntimeError: torch on a device that does not exist
        print(f"tokenspeed.kernels: {error}".splitlines()[0], file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every declared implementation, and the plug-ins")
    explain = commands.add_parser("explain", help="what is chosen for an op on this machine, and why nothing else")
    numerics = commands.add_parser("numerics", help="every implementation against the reference in float64")
    numerics.add_argument("op", metavar="OP", nargs="*", help="only these")
    measure = commands.add_parser("bench", help="how long a call takes, and how near that is to the limit")
    fastest = commands.add_parser("tune", help="keep the fastest implementation by number of tokens, for selection")
    for command in (explain, measure, fastest):
        command.add_argument("op", metavar="OP", help=", ".join(OPS))
        command.add_argument(
            "shape", metavar="NAME=VALUE", nargs="*",
            help="a trait or another size of the op, for example head_dim=128; bench and tune take VALUE,VALUE… too",
        )  # fmt: skip
        here = "cuda" if torch.cuda.is_available() else "cpu"
        command.add_argument("--device", default=here, help="default: %(default)s")
        command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    numerics.add_argument("--device", help="default: the CPU, and the GPU if there is one")
    numerics.add_argument("--dtype", choices=DTYPES, help="default: all")
    return parser


def _numerics(options: argparse.Namespace) -> int:
    """Print the table; 1 if a line of it is wrong."""
    devices = suite.devices() if options.device is None else [torch.device(options.device)]
    dtypes = tuple(suite.TOLERANCE) if options.dtype is None else (DTYPES[options.dtype],)
    wrong = 0
    for line in suite.table(suite.trials(default(), devices, options.op or tuple(suite.CASES), dtypes)):
        print(line, flush=True)
        wrong += not line.good
    return min(wrong, 1)


def _lines(options: argparse.Namespace) -> Iterator[str]:
    selector = default()
    if options.command == "list":
        yield listing(selector)
        return
    device, dtype, shapes = torch.device(options.device), DTYPES[options.dtype], shapes_of(options.shape)
    if options.command == "explain":
        for traits in shapes:
            yield str(selector.explain(options.op, Target(Platform.of(device), dtype), traits))
    elif options.command == "bench":
        yield from bench(selector, options.op, shapes, dtype, device)
    else:
        yield from tune(selector, Winners.of_user(), options.op, shapes, dtype, device)


def shapes_of(assignments: Sequence[str]) -> list[dict[str, TraitValue]]:
    """All combinations of "NAME=VALUE,VALUE…". Raises `KernelError` for what is not of that form."""
    options: dict[str, list[TraitValue]] = {}
    for assignment in assignments:
        name, equals, values = assignment.partition("=")
        if not equals or not name or not all(values.split(",")):
            raise KernelError(f"{assignment!r} is not of the form NAME=VALUE or NAME=VALUE,VALUE")
        if name in options:
            raise KernelError(f"{name} is given twice")
        options[name] = [_value(text) for text in values.split(",")]
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def _value(text: str) -> TraitValue:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if text.removeprefix("-").isdecimal() else text


def listing(selector: Selector) -> str:
    """One line an implementation: op, name, priority, platforms, types, restrictions; then the plug-ins."""
    rows: list[tuple[str, ...]] = [("op", "implementation", "priority", "platforms", "types", "only if")]
    rows += [_row(implementation) for implementation in selector.registry.all()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    for plugin in selector.plugins:
        result = plugin.failure or f"{plugin.num_implementations} implementations"
        lines.append(f"plug-in {plugin.name} ({plugin.module}): {result}")
    return "\n".join(lines)


def _row(implementation: Implementation) -> tuple[str, ...]:
    types = "any"
    if implementation.dtypes is not None:
        types = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in implementation.dtypes))
    return (
        implementation.op,
        implementation.name,
        str(implementation.priority),
        " or ".join(map(str, implementation.platforms)),
        types,
        "; ".join(f"{name} is {condition}" for name, condition in implementation.traits.items()),
    )


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it without a word
    sys.exit(main())
