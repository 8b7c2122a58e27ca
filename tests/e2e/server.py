"""A real server process on a free port, for tests that speak HTTP."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str, timeout: float = 5.0) -> tuple[int, str]:
    """Status and body, whatever the status is; (0, reason) if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except (urllib.error.URLError, OSError) as error:
        return 0, str(error)


class Server:
    """One server process of `program`, a module and its arguments; `url` is its address, `log` has its output."""

    def __init__(self, log: Path, *flags: str, program: tuple[str, ...] = ("tokenspeed.entrypoints.api",)) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        command = [sys.executable, "-m", *program, "--port", str(self.port), *flags]
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ
            )

    def wait_ready(self, seconds: float = 60.0) -> float:
        """Seconds until /ready said 200."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}: {self.log.read_text()}")
            if get(f"{self.url}/ready")[0] == 200:
                return time.monotonic() - began
            time.sleep(0.05)
        raise AssertionError(f"not ready: {self.log.read_text()}")

    def engine_pid(self) -> int:
        """The engine process, the server's only child."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        engines = [pid for pid in children if "engine" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert len(engines) == 1, children
        return int(engines[0])

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        text = get(f"{self.url}/metrics")[1]
        found = [
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith(f"tokenspeed:{name}") and not line.startswith("#")
        ]
        assert found, f"no metric {name} in {text}"
        return sum(found)

    def stop(self, signum: int = signal.SIGTERM, seconds: float = 40.0) -> int:
        """Signal and wait; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextlib.contextmanager
def serving(log: Path, *flags: str, program: tuple[str, ...] = ("tokenspeed.entrypoints.api",)) -> Iterator[Server]:
    """A ready server that is gone afterwards."""
    server = Server(log, *flags, program=program)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()
