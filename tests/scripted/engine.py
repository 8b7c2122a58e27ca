"""The engine process with a scripted model: `python -m tests.scripted.engine FD LEVEL FORMAT`."""

from __future__ import annotations

from tests.scripted.executor import load_scripted
from tokenspeed.engine import process, service

if __name__ == "__main__":
    service.load_executor = load_scripted
    process.main()
