"""`python -m tokenspeed serve`: several engines and the Shepherd Model Gateway before them, on one machine.

It starts the programs and watches them. An engine that ends is started again; when the gateway ends, everything does.
Which engine gets a request is the gateway's choice alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import itertools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from tokenspeed.entrypoints.flags import GRPC, GRPC_PORT, is_loopback, parse_flags
from tokenspeed.entrypoints.listen import bind
from tokenspeed.errors import ConfigError
from tokenspeed.logs import configure_logging

log = logging.getLogger(__name__)

EXIT_CONFIG, EXIT_FAILED = 2, 1
MAX_RESTARTS = 5
RESTART_WINDOW = 600.0
POLICIES = ("cache_aware", "least_load", "power_of_two", "round_robin", "random")
POLL_SECONDS = 0.2
DEVICE = re.compile(r"\d+|(GPU|MIG)-\S+", re.ASCII)
GATEWAY_SETTLES = 10.0
"""Seconds that the gateway takes for its own end besides those that running requests get."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """What to start. `engine_flags` are every engine's own, `gateway_flags` the gateway's besides ours."""

    workers: int
    host: str
    port: int
    worker_port: int
    policy: str
    grace: float
    devices: tuple[str, ...]
    engine_flags: tuple[str, ...]
    gateway_flags: tuple[str, ...]

    @property
    def addresses(self) -> list[str]:
        """Where the engines listen, on this machine only."""
        return [f"127.0.0.1:{self.worker_port + number}" for number in range(self.workers)]

    def engine(self, number: int) -> tuple[list[str], dict[str, str]]:
        """The command of an engine, and what it finds in its environment besides ours: its share of the GPUs."""
        port = str(self.worker_port + number)
        command = [sys.executable, "-m", GRPC.module, "--host", "127.0.0.1", "--port", port, *self.engine_flags]
        each = len(self.devices) // self.workers
        mine = self.devices[number * each : (number + 1) * each]
        return command, {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if self.devices else {}

    def gateway(self) -> list[str]:
        """The command of the gateway."""
        return [
            sys.executable, "-m", "smg.launch_router",
            "--backend", "tokenspeed", "--worker-urls", *(f"grpc://{address}" for address in self.addresses),
            "--host", self.host, "--port", str(self.port), "--policy", self.policy,
            "--shutdown-grace-period-secs", str(round(self.grace)), "--log-level", "warn", *self.gateway_flags,
        ]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Run until told to stop, or until the gateway ends; the return value is the exit status."""
    try:
        fleet = parse(arguments, os.environ)
    except ConfigError as error:
        print(f"tokenspeed: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    configure_logging("info", "text", role="fleet")
    return asyncio.run(_Running(fleet).serve())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Fleet:
    """Resolve the command line, or raise `ConfigError` in one line. What is behind `--` is the gateway's."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    ours, theirs = arguments[:end], arguments[end + 1 :]
    parser = _Parser(
        prog="python -m tokenspeed serve",
        description=__doc__,
        epilog=f"Other flags are those of every engine (python -m {GRPC.module} --help); what follows a -- is the "
        "gateway's (smg launch --help).",
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=int, default=1, help="engines to start (default: %(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="where the gateway listens (default: %(default)s)")
    parser.add_argument("--port", type=int, default=30000, help="port of the gateway (default: %(default)s)")
    first = "port of the first engine, others follow (default: %(default)s)"
    parser.add_argument("--worker-port", type=int, default=GRPC_PORT, help=first)
    parser.add_argument("--policy", choices=POLICIES, default=POLICIES[0], help="of the gateway (default: %(default)s)")
    named, flags = parser.parse_known_args(ours)
    if named.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {named.workers}")
    last = named.worker_port + named.workers - 1
    if not (0 < named.port <= 65535 and named.worker_port > 0 and last <= 65535):
        raise ConfigError(f"--port {named.port} and --worker-port {named.worker_port} to {last} must be ports")
    if named.worker_port <= named.port <= last:
        raise ConfigError(f"--port {named.port} is also an engine's (--worker-port {named.worker_port} to {last})")
    for host, port in ((named.host, named.port), *(("127.0.0.1", port) for port in range(named.worker_port, last + 1))):
        bind(host, port).close()  # one that is taken is told now, not by a program that was started
    if importlib.util.find_spec("smg") is None or importlib.util.find_spec("smg_grpc_proto") is None:
        raise ConfigError("serve needs the gateway: pip install 'tokenspeed[smg]'")
    config = parse_flags(["--host", "127.0.0.1", "--port", str(named.worker_port), *flags], environment, GRPC)
    if config.api_keys or config.ssl_certfile:
        raise ConfigError(
            "the gateway sends engines no key and speaks no TLS with them: leave out --api-key (TOKENSPEED_API_KEY) "
            "and --ssl-certfile; the gateway's own flags follow a --"
        )
    if config.engine.record is not None:
        raise ConfigError("--record is of one engine that is never started again: its file must be new")
    if config.explain_parallel:
        raise ConfigError(f"--explain-parallel serves nothing: python -m {GRPC.module} --explain-parallel …")
    guarded = any(part.partition("=")[0] in ("--api-key", "--tenant-api-key") for part in theirs)
    if not (guarded or config.insecure or is_loopback(named.host)):
        raise ConfigError(f"--host {named.host} is public: add -- --api-key KEY, or --insecure to serve everybody")
    ranks = named.workers * config.engine.parallel.world
    devices = _devices(environment)
    if devices and len(devices) < ranks:
        raise ConfigError(f"--workers {named.workers} need {ranks} GPUs, there are {len(devices)}")
    if not devices and config.engine.num_threads is None:
        share = max(1, len(os.sched_getaffinity(0)) // ranks)
        flags += ["--num-threads", str(share)]
    return Fleet(
        named.workers, named.host, named.port, named.worker_port, named.policy, config.shutdown_grace,
        devices[:ranks], tuple(flags), tuple(theirs),
    )  # fmt: skip


def _devices(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The GPUs of this process, by the names that CUDA_VISIBLE_DEVICES has for them."""
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = [part.strip() for part in named.split(",")]
        return tuple(itertools.takewhile(lambda name: DEVICE.fullmatch(name) is not None, names))  # as CUDA reads it
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]  # not the slices of one
    return tuple(map(str, range(len(gpus)))) if listed.returncode == 0 else ()


class _Running:
    """The programs of a fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._stop = asyncio.Event()
        self._failed = False
        self._engines: dict[int, asyncio.subprocess.Process] = {}
        self._gateway: asyncio.subprocess.Process | None = None

    async def serve(self) -> int:
        """Start, watch, stop; the exit status."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._told_to_stop)
        watching = [asyncio.create_task(self._engine(number)) for number in range(self._fleet.workers)]
        try:
            await self._until(self._healthy())
            if not self._stop.is_set():
                self._gateway = await asyncio.create_subprocess_exec(*self._fleet.gateway(), start_new_session=True)
                log.info(
                    "%d engines behind http://%s:%d", self._fleet.workers, self._fleet.host, self._fleet.port
                )
                await self._until(self._gateway.wait())
                if not self._stop.is_set():
                    log.error("the gateway ended with status %s", self._gateway.returncode)
                    self._fail()
        finally:
            self._stop.set()
            await self._end()
            await asyncio.gather(*watching)
        return EXIT_FAILED if self._failed else 0

    def _told_to_stop(self) -> None:
        """Once: programs get their time to end. Once more: none."""
        if self._stop.is_set():
            for process in (self._gateway, *self._engines.values()):
                if process is not None and process.returncode is None:
                    process.kill()
        self._stop.set()

    def _fail(self) -> None:
        self._failed = True
        self._stop.set()

    async def _until(self, work: object) -> None:
        """Await `work`, or that we are to stop."""
        tasks = [asyncio.ensure_future(work), asyncio.create_task(self._stop.wait())]  # type: ignore[call-overload]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if not tasks[0].cancelled():
            tasks[0].result()  # raises what went wrong in it

    async def _engine(self, number: int) -> None:
        """Keep one engine running. One that ends again and again, or that cannot work as asked, ends everything."""
        ends: list[float] = []
        while not self._stop.is_set():
            try:
                status = await self._one_engine(number)
            except OSError as error:
                log.error("engine %d cannot be started: %s", number, error)
                status = EXIT_FAILED
                await asyncio.sleep(POLL_SECONDS)
            if self._stop.is_set():
                return
            ends = [at for at in ends if time.monotonic() - at < RESTART_WINDOW] + [time.monotonic()]
            if status == EXIT_CONFIG or len(ends) > MAX_RESTARTS:
                log.error("engine %d ended with status %d", number, status)
                self._fail()
                return
            log.error("engine %d ended with status %d and is started again", number, status)

    async def _one_engine(self, number: int) -> int:
        """Start an engine and wait for its end; its exit status. Raises `OSError` when it cannot be started."""
        command, environment = self._fleet.engine(number)
        process = self._engines[number] = await asyncio.create_subprocess_exec(
            *command, env=os.environ | environment, start_new_session=True
        )
        if self._stop.is_set():  # since we began to start it: `_end` may have looked before it was there
            await _terminate([process], self._fleet.grace + GATEWAY_SETTLES)
        return await process.wait()

    async def _healthy(self) -> None:
        """Returns when every engine serves."""
        import grpc  # noqa: PLC0415  (an extra)
        from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb  # noqa: PLC0415
        from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as stubs  # noqa: PLC0415

        for address in self._fleet.addresses:
            async with grpc.aio.insecure_channel(address) as channel:
                stub = stubs.TokenSpeedSchedulerStub(channel)
                healthy = False
                while not healthy:
                    with contextlib.suppress(grpc.RpcError):
                        healthy = (await stub.HealthCheck(pb.HealthCheckRequest(), timeout=5.0)).healthy
                    await asyncio.sleep(0 if healthy else POLL_SECONDS)

    async def _end(self) -> None:
        """The gateway first, so that it ends what its clients wait for; then the engines."""
        await _terminate([self._gateway] if self._gateway is not None else [], self._fleet.grace + GATEWAY_SETTLES)
        await _terminate(list(self._engines.values()), self._fleet.grace + GATEWAY_SETTLES)


async def _terminate(processes: Sequence[asyncio.subprocess.Process], seconds: float) -> None:
    for process in processes:
        if process.returncode is None:
            process.terminate()
    try:
        await asyncio.wait_for(asyncio.gather(*(process.wait() for process in processes)), seconds)
    except TimeoutError:
        for process in processes:
            if process.returncode is None:
                log.warning("process %d does not end and is killed", process.pid)
                process.kill()
                await process.wait()
