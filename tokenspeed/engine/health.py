"""Whether an engine serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["loading", "ready", "restarting", "draining", "dead"]


@dataclass(frozen=True, slots=True)
class Health:
    """`heartbeat_age` is in seconds since the engine was last heard of, `restarts` how often one took over."""

    state: State
    error: str | None
    heartbeat_age: float
    restarts: int
