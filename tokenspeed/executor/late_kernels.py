"""A line in the log for each kernel that is compiled once steps are served: warming up should have met it."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

log = logging.getLogger(__name__)


def report_late_kernels() -> None:
    """From now on warn of every Triton kernel that this process compiles or loads from Triton's disk cache: its name,
    and the seconds for which its step waited."""
    from triton import knobs  # noqa: PLC0415 - a start without a GPU does without triton

    started = threading.local()

    def begins(**_: Any) -> None:
        started.at = time.perf_counter()

    def ends(*, repr: str, **_: Any) -> None:
        seconds = time.perf_counter() - started.at
        log.warning("a step waited %.2f s for a kernel that the start had not met: %s", seconds, repr)

    knobs.runtime.jit_cache_hook = begins
    knobs.runtime.jit_post_compile_hook = ends
