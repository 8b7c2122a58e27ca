"""`python -m tokenspeed.bench NAME …`: benchmark programs. `serve` measures a running server over HTTP."""

from __future__ import annotations

import argparse
import sys

from tokenspeed.bench import serve


def main() -> int:
    """Run one program; the return value is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.bench", description=__doc__)
    programs = parser.add_subparsers(dest="program", required=True, metavar="NAME")
    serve.add_flags(
        programs.add_parser("serve", help="streaming latency and throughput of a server", description=serve.__doc__)
    )
    return serve.main(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
