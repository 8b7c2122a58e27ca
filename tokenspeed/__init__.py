"""TokenSpeed: an LLM inference engine for coding agents.

The public names are loaded on first use, so that `import tokenspeed` costs nothing and never pulls in
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenspeed.config import EngineConfig, Parallel
    from tokenspeed.engine.async_engine import AsyncEngine
    from tokenspeed.engine.llm import LLM
    from tokenspeed.request import RequestOutput, SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncEngine", "EngineConfig", "Parallel", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "AsyncEngine": "tokenspeed.engine.async_engine",
    "EngineConfig": "tokenspeed.config",
    "LLM": "tokenspeed.engine.llm",
    "Parallel": "tokenspeed.config",
    "RequestOutput": "tokenspeed.request",
    "SamplingParams": "tokenspeed.request",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
