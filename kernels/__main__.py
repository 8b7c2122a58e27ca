"""`python -m tokenspeed.kernels list` and `explain OP`: what there is, and what would run here and why."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

import torch

from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import OPS, Implementation, KernelError, Target, TraitValue
from tokenspeed.kernels.selection import Selector, default

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0 on success, 1 with one line on standard error when something is refused."""
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="every declared implementation, and the plug-ins")
    explain = commands.add_parser("explain", help="what is chosen for an op on this machine, and why nothing else")
    explain.add_argument("op", metavar="OP", help=", ".join(OPS))
    explain.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    explain.add_argument("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    explain.add_argument(
        "--trait", action="append", default=[], metavar="NAME=VALUE", help="for example head_dim=128; may be repeated"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        if options.command == "list":
            print(listing(default()))
        else:
            target = Target(Platform.of(torch.device(options.device)), DTYPES[options.dtype])
            print(default().explain(options.op, target, dict(map(_trait, options.trait))))
    except (KernelError, RuntimeError) as error:  # RuntimeError: torch on a device that does not exist
        print(f"tokenspeed.kernels: {error}".splitlines()[0], file=sys.stderr)
        return 1
    return 0


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


def _trait(text: str) -> tuple[str, TraitValue]:
    name, equals, value = text.partition("=")
    if not equals:
        raise KernelError(f"--trait {text!r} is not of the form NAME=VALUE")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if value.lstrip("-").isdigit() else value


if __name__ == "__main__":
    sys.exit(main())
