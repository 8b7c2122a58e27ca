"""A rank that cannot load what every other can."""

from __future__ import annotations

from typing import NoReturn

from tokenspeed.engine import rank
from tokenspeed.errors import ConfigError


def refuse(*_: object, **__: object) -> NoReturn:
    raise ConfigError("there is no room on this one")


if __name__ == "__main__":
    rank.load_executor = refuse
    rank.main()
