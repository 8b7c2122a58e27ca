"""`python -m tokenspeed serve …`: engines and a gateway before them, on one machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tokenspeed import __version__

USAGE = """usage: python -m tokenspeed COMMAND ...

commands:
  serve    several engines and the Shepherd Model Gateway before them (python -m tokenspeed serve --help)

other programs:
  python -m tokenspeed.entrypoints.api     one engine, served over HTTP
  python -m tokenspeed.entrypoints.grpc    one engine, served over gRPC
  python -m tokenspeed.kernels             which kernels there are, which is chosen, and why
  python -m tokenspeed.parallel            how a model lies over ranks
  python -m tokenspeed.bench               benchmarks"""


def main(arguments: Sequence[str]) -> int:
    """Run a command; the return value is the exit status."""
    match arguments:
        case ["serve", *rest]:
            from tokenspeed.entrypoints.fleet import main as serve  # noqa: PLC0415

            return serve(rest)
        case ["--version"]:
            print(__version__)
            return 0
        case ["-h" | "--help"]:
            print(USAGE)
            return 0
    print(USAGE, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
