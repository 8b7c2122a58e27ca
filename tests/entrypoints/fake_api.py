"""`tokenspeed.entrypoints.api` with the fake engine in the place of the real one, as a process for tests.

TEST_LOAD_SECONDS is how long it loads; TEST_LOAD_ERROR makes loading fail with that text; TEST_TOKEN_SECONDS is the
time a token takes. A request with the cache salt "bug" meets a defect.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from tests.entrypoints.fake_engine import FakeEngine, FakeStream, Health
from tokenspeed.entrypoints import api, life
from tokenspeed.errors import ConfigError


class LoadingEngine(FakeEngine):
    def __init__(self, config: Any, *, progress: Any, link: Any) -> None:
        super().__init__()
        self.delay = float(os.environ.get("TEST_TOKEN_SECONDS", "0"))
        self.state = Health("loading")

    async def start(self) -> None:
        await asyncio.sleep(float(os.environ.get("TEST_LOAD_SECONDS", "0")))
        if error := os.environ.get("TEST_LOAD_ERROR"):
            raise ConfigError(error)
        await super().start()

    async def submit(self, *arguments: Any, cache_salt: str = "", **named: Any) -> FakeStream:
        if cache_salt.endswith("bug"):
            raise ZeroDivisionError
        return await super().submit(*arguments, cache_salt=cache_salt, **named)


if __name__ == "__main__":
    life.AsyncEngine = LoadingEngine  # type: ignore[assignment,misc]
    sys.exit(api.main())
