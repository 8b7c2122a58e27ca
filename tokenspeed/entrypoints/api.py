"""`python -m tokenspeed.entrypoints.api`: serve a model over HTTP, and over gRPC besides with --grpc-port."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tokenspeed.entrypoints.flags import HTTP
from tokenspeed.entrypoints.run import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop; the return value is the exit status."""
    return run(HTTP, arguments)


if __name__ == "__main__":
    sys.exit(main())
