"""The door of the control plane, which is written in C++ (csrc/)."""

from tokenspeed._core.scheduler import Scheduler
from tokenspeed._core.types import Misuse, Policy, Refusal, Stats

__all__ = ["Misuse", "Policy", "Refusal", "Scheduler", "Stats"]
