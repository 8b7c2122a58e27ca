"""Random tests draw the same examples in every run, so that a change is judged by itself and not by luck.

`pytest --hypothesis-profile=fresh` draws new ones (scripts/test_long.sh does); what it finds becomes an example here.
"""

from __future__ import annotations

import os

from hypothesis import settings

# Read once, at import of grpc, which some tests do before the server's own module: see there.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

settings.register_profile("same", derandomize=True)
settings.register_profile("fresh", derandomize=False)
settings.load_profile("same")
