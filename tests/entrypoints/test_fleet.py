"""`python -m tokenspeed serve`: command lines, shares of a machine, and programs that come and go."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tokenspeed.__main__ import main as program
from tokenspeed.entrypoints import fleet
from tokenspeed.entrypoints.fleet import EXIT_CONFIG, EXIT_FAILED, MAX_RESTARTS, Fleet
from tokenspeed.errors import ConfigError

CPU = {"CUDA_VISIBLE_DEVICES": ""}


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(42000 + os.getpid() % 1000 * 10, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def parse(*arguments: str, workers: int = 1, **environment: str) -> Fleet:
    """The fleet of these arguments, on ports that are free."""
    first = free_ports(workers + 1)
    ports = ["--port", str(first), "--worker-port", str(first + 1), "--workers", str(workers)]
    return fleet.parse([*ports, *arguments], {**CPU, **environment})


def refusal(*arguments: str, **environment: str) -> str:
    with pytest.raises(ConfigError) as refused:
        fleet.parse(arguments, {**CPU, **environment})
    assert "\n" not in str(refused.value)
    return str(refused.value)


# What is started ---------------------------------------------------------------------------------------


def test_an_engine_has_its_port_on_this_machine_and_the_flags_that_are_not_ours() -> None:
    it = parse("--max-num-seqs", "8", "--num-threads", "1", "--served-model-name", "m", workers=2)
    for number in (0, 1):
        command, environment = it.engine(number)
        assert command == [
            sys.executable, "-m", "tokenspeed.entrypoints.grpc", "--host", "127.0.0.1",
            "--port", str(it.worker_port + number), "--max-num-seqs", "8", "--num-threads", "1",
            "--served-model-name", "m",
        ]  # fmt: skip
        assert environment == {}


def test_the_gateway_has_all_engines_and_what_is_behind_two_dashes() -> None:
    it = parse("--policy", "least_load", "--shutdown-grace", "7.6", "--", "--max-payload-size", "9", "", "--", "x",
               workers=2)  # fmt: skip
    command = it.gateway()
    assert command[:3] == [sys.executable, "-m", "smg.launch_router"]
    at = command.index("--worker-urls")
    assert command[at + 1 : at + 3] == [f"grpc://127.0.0.1:{it.worker_port + number}" for number in (0, 1)]
    for flag, value in (("--port", str(it.port)), ("--policy", "least_load"), ("--shutdown-grace-period-secs", "8")):
        assert command[command.index(flag) + 1] == value
    assert command[-5:] == ["--max-payload-size", "9", "", "--", "x"]
    assert it.grace == 7.6


def test_two_dashes_may_come_first_last_or_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "bind", lambda host, port: socket.socket())
    for arguments, theirs in ((["--", "--a"], ("--a",)), (["--workers", "1", "--"], ()), (["--"], ())):
        it = fleet.parse(arguments, CPU)
        assert it.gateway_flags == theirs and "--" not in it.engine_flags


def test_gpus_are_dealt_by_ranks_and_one_too_few_is_refused() -> None:
    it = parse("-tp", "2", workers=2, CUDA_VISIBLE_DEVICES="7, 5,GPU-abc,1,0")
    assert [it.engine(number)[1] for number in (0, 1)] == [
        {"CUDA_VISIBLE_DEVICES": "7,5"}, {"CUDA_VISIBLE_DEVICES": "GPU-abc,1"}
    ]  # fmt: skip
    assert "--num-threads" not in it.engine_flags
    with pytest.raises(ConfigError, match="--workers 2 need 4 GPUs, there are 3"):
        parse("-tp", "2", workers=2, CUDA_VISIBLE_DEVICES="0,1,2")


def test_gpus_are_those_of_the_machine_unless_they_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho GPU 0: x\necho GPU 1: y\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert fleet._devices({}) == ("0", "1")
    assert fleet._devices({"CUDA_VISIBLE_DEVICES": "3"}) == ("3",)
    assert fleet._devices(CPU) == ()
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert fleet._devices({}) == ()
    tool.unlink()
    assert fleet._devices({}) == ()


def test_without_gpus_cores_are_shared_unless_threads_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(9)))
    assert parse(workers=2).engine_flags == ("--num-threads", "4")
    assert parse("-tp", "2", workers=2).engine_flags == ("-tp", "2", "--num-threads", "2")
    assert parse("--num-threads", "3", workers=2).engine_flags == ("--num-threads", "3")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert parse(workers=2).engine_flags == ("--num-threads", "1")


def test_a_file_of_flags_may_be_of_a_server_that_is_public_by_itself(tmp_path: Path) -> None:
    file = tmp_path / "flags.yaml"
    file.write_text("host: 0.0.0.0\nshutdown-grace: 3\n")
    assert parse("--config", str(file)).grace == 3


# What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--workers", "two"], "--workers"),
        (["--policy", "best"], "--policy"),
        (["--port", "0"], "--port 0"),
        (["--worker-port", "65535", "--workers", "2"], "65535 to 65536"),
        (["--port", "50052", "--workers", "3"], "--port 50052 is also an engine's"),
    ],
)
def test_our_own_flags_are_checked(arguments: list[str], words: str) -> None:
    assert words in refusal(*arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--block-size", "7"], "--block-size"),
        (["--grpc-port", "1"], "--grpc-port"),
        (["--tool-call-parser", "hermes"], "--tool-call-parser"),
        (["--api-key", "k"], "leave out --api-key"),
        (["--record", "calls"], "--record is of one engine"),
        (["--explain-parallel"], "--explain-parallel serves nothing"),
        (["--ssl-keyfile", "k", "--ssl-certfile", "c"], "TLS"),
    ],
)
def test_an_engines_flags_are_checked_before_any_is_started(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(*arguments)
    assert words in str(refused.value)


def test_a_key_from_the_environment_is_refused_too() -> None:
    with pytest.raises(ConfigError, match="TOKENSPEED_API_KEY"):
        parse(TOKENSPEED_API_KEY="k")


def test_a_gateway_that_everybody_reaches_has_a_key_or_is_meant_to_have_none() -> None:
    with pytest.raises(ConfigError, match=r"--host 0\.0\.0\.0 is public: add -- --api-key KEY"):
        parse("--host", "0.0.0.0", "--", "--request-id-headers", "x-api-key")
    for guard in (["--", "--api-key", "k"], ["--", "--api-key=k"], ["--", "--tenant-api-key", "a:k"], ["--insecure"]):
        assert parse("--host", "0.0.0.0", *guard).host == "0.0.0.0"


def test_a_taken_port_is_told_at_once() -> None:
    first = free_ports(3)
    for taken in (first, first + 2):
        with socket.socket() as other:
            other.bind(("127.0.0.1", taken))
            other.listen()
            words = refusal("--port", str(first), "--worker-port", str(first + 1), "--workers", "2")
            assert f"--port {taken} is already in use" in words


def test_without_the_gateway_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = fleet.importlib.util.find_spec
    monkeypatch.setattr(fleet.importlib.util, "find_spec", lambda name: None if name == "smg" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'tokenspeed\[smg\]'"):
        parse()


def test_a_wrong_command_line_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert program(["serve", "--workers", "0"]) == EXIT_CONFIG
    assert capsys.readouterr().err == "tokenspeed: --workers must be at least 1, got 0\n"
    assert program(["sevre"]) == EXIT_CONFIG
    assert "usage:" in capsys.readouterr().err
    assert program(["--help"]) == 0
    assert "serve" in capsys.readouterr().out


# Programs that come and go -----------------------------------------------------------------------------

ENGINE = """
import os, pathlib, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as stubs

class Servicer(stubs.TokenSpeedSchedulerServicer):
    def HealthCheck(self, request, context):
        return pb.HealthCheckResponse(healthy=True)

server = grpc.server(ThreadPoolExecutor(1))
stubs.add_TokenSpeedSchedulerServicer_to_server(Servicer(), server)
server.add_insecure_port("127.0.0.1:" + sys.argv[1])
server.start()
pathlib.Path(sys.argv[2], f"engine-{sys.argv[1]}-{os.getpid()}").touch()
server.wait_for_termination()
"""
GATEWAY = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], f"gateway-{os.getpid()}").touch()
time.sleep(float(sys.argv[2]))
sys.exit(3)
"""


@dataclass(frozen=True)
class Toys(Fleet):
    """A fleet of small programs that write down that they were started."""

    folder: Path = Path()
    engine_code: str = ENGINE
    gateway_seconds: float = 600.0

    def engine(self, number: int) -> tuple[list[str], dict[str, str]]:
        port = str(self.worker_port + number)
        return [sys.executable, "-c", self.engine_code, port, str(self.folder)], {}

    def gateway(self) -> list[str]:
        return [sys.executable, "-c", GATEWAY, str(self.folder), str(self.gateway_seconds)]

    def started(self, name: str) -> list[int]:
        """Process ids of those that were started."""
        return [int(file.name.rpartition("-")[2]) for file in self.folder.glob(f"{name}-*")]

    async def until(self, name: str, count: int) -> list[int]:
        """Wait until so many were started."""
        async with asyncio.timeout(20):
            while len(self.started(name)) < count:
                await asyncio.sleep(0.02)
        return self.started(name)


def toys(folder: Path, workers: int = 1, **fields: Any) -> Toys:
    first = free_ports(workers + 1)
    return Toys(workers, "127.0.0.1", first, first + 1, "random", 5.0, (), (), (), folder=folder, **fields)


def running(it: Toys, work: Callable[[], Awaitable[None]] | None = None) -> int:
    """The exit status of a fleet beside which `work` is done; nothing of it is left."""

    async def serve() -> int:
        serving = asyncio.create_task(fleet._Running(it).serve())
        if work is not None:
            await work()
        return await asyncio.wait_for(serving, 30)

    status = asyncio.run(serve())
    for process in it.started("*"):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    return status


def test_the_gateway_starts_behind_all_engines_and_a_signal_ends_everything(tmp_path: Path) -> None:
    it = toys(tmp_path, workers=2)

    async def work() -> None:
        await it.until("gateway", 1)
        assert len(it.started("engine")) == 2
        os.kill(os.getpid(), signal.SIGTERM)

    assert running(it, work) == 0


def test_a_closed_terminal_is_a_signal_too_and_a_second_one_waits_for_nobody(tmp_path: Path) -> None:
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + ENGINE
    it = toys(tmp_path, engine_code=deaf)
    it = dataclasses.replace(it, grace=300.0)

    async def work() -> None:
        await it.until("gateway", 1)
        os.kill(os.getpid(), signal.SIGHUP)
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    assert running(it, work) == 0


def test_an_engine_that_cannot_be_started_for_once_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = toys(tmp_path)
    create, failed = asyncio.create_subprocess_exec, []

    async def once_not(*command: str, **options: Any) -> asyncio.subprocess.Process:
        if not failed:
            failed.append(command)
            raise BlockingIOError("no process is left")
        return await create(*command, **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", once_not)

    async def work() -> None:
        await it.until("gateway", 1)
        os.kill(os.getpid(), signal.SIGINT)

    assert running(it, work) == 0
    assert len(failed) == 1 and len(it.started("engine")) == 1


def test_an_engine_that_dies_is_started_again(tmp_path: Path) -> None:
    it = toys(tmp_path)

    async def work() -> None:
        await it.until("gateway", 1)
        (first,) = it.started("engine")
        os.kill(first, signal.SIGKILL)
        await it.until("engine", 2)
        os.kill(os.getpid(), signal.SIGINT)

    assert running(it, work) == 0
    assert len(it.started("gateway")) == 1


def test_a_gateway_that_ends_is_the_end_of_everything(tmp_path: Path) -> None:
    it = toys(tmp_path, gateway_seconds=0.1)
    assert running(it) == EXIT_FAILED
    assert len(it.started("engine")) == len(it.started("gateway")) == 1


@pytest.mark.parametrize(("status", "starts"), [(EXIT_CONFIG, 1), (3, MAX_RESTARTS + 1)])
def test_an_engine_that_cannot_work_or_dies_again_and_again_ends_everything(
    tmp_path: Path, status: int, starts: int
) -> None:
    code = "import os, pathlib, sys; pathlib.Path(sys.argv[2], f'engine-{os.getpid()}').touch()"
    it = toys(tmp_path, engine_code=f"{code}; sys.exit({status})")
    assert running(it) == EXIT_FAILED
    assert len(it.started("engine")) == starts and not it.started("gateway")


def test_a_signal_that_comes_while_an_engine_is_being_started_leaves_none_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = toys(tmp_path)
    create = asyncio.create_subprocess_exec
    told = asyncio.Event()

    async def slowly(*command: str, **options: Any) -> asyncio.subprocess.Process:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.2)
        process = await create(*command, **options)
        told.set()
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", slowly)
    assert running(it) == 0 and told.is_set()


def test_what_goes_wrong_while_waiting_for_engines_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    it = toys(tmp_path)

    async def broken(_: fleet._Running) -> None:
        raise ModuleNotFoundError("no module named grpc")

    monkeypatch.setattr(fleet._Running, "_healthy", broken)
    with pytest.raises(ModuleNotFoundError):
        running(it)
    assert not it.started("gateway")
