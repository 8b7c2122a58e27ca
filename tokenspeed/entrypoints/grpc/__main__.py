"""`python -m tokenspeed.entrypoints.grpc`: serve a model over gRPC alone, behind the gateway."""

from __future__ import annotations

import sys

from tokenspeed.entrypoints.flags import GRPC
from tokenspeed.entrypoints.run import run

if __name__ == "__main__":
    sys.exit(run(GRPC))
