"""The server as a process: ports, signals, exit status, what it prints."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tokenspeed.entrypoints import api, run

REPOSITORY = Path(__file__).parents[2]


@contextlib.contextmanager
def process(
    *flags: str, module: str = "tests.entrypoints.fake_api", **environment: str
) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-m", module, *flags],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.kill()
        child.communicate()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(
            method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        return response.status, dict(response.getheaders()), response.read().decode()
    finally:
        connection.close()


def wait_status(port: int, path: str, status: int, seconds: float = 15.0) -> dict[str, str]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            got, headers, _ = ask(port, "GET", path)
            if got == status:
                return headers
        time.sleep(0.03)
    raise AssertionError(f"{path} did not become {status}")


def test_a_taken_port_is_one_line_before_anything_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with process("--port", str(port), module="tokenspeed.entrypoints.api") as child:
            out, err = child.communicate(timeout=15)
    assert child.returncode == 2
    assert err == f"tokenspeed: --port {port} is already in use on 127.0.0.1\n"
    assert out == ""


@pytest.mark.parametrize(
    "flags",
    [["--flux"], ["--model", "x", "--trust-remote-code"], ["--ssl-keyfile", "/none", "--ssl-certfile", "/none"]],
)
def test_a_wrong_flag_is_one_line_and_status_2(flags: list[str]) -> None:
    with process(*flags, module="tokenspeed.entrypoints.api") as child:
        _, err = child.communicate(timeout=15)
    assert child.returncode == 2
    assert err.startswith("tokenspeed: ") and err.count("\n") == 1
    assert flags[-1] in err or flags[0] in err


def test_a_model_that_cannot_be_loaded_is_one_line_and_status_2() -> None:
    with process("--port", "0", TEST_LOAD_ERROR="m.gguf is truncated") as child:
        out, err = child.communicate(timeout=15)
    assert (child.returncode, out) == (2, "")
    assert err.splitlines()[-1] == "tokenspeed: m.gguf is truncated"
    assert "Traceback" not in err


def test_loading_answers_503_then_the_printed_line_works_then_sigterm_ends_with_0() -> None:
    port = free_port()
    with process("--port", str(port), TEST_LOAD_SECONDS="0.6") as child:
        assert int(wait_status(port, "/health", 503)["Retry-After"]) > 0
        assert ask(port, "POST", "/v1/completions", {"model": "echo", "prompt": "x"})[0] == 503
        wait_status(port, "/ready", 200)
        assert child.stdout is not None
        assert f"http://127.0.0.1:{port}" in child.stdout.readline()
        line = shlex.split(child.stdout.readline())
        assert line[:2] == ["curl", f"http://127.0.0.1:{port}/v1/chat/completions"]
        status, _, body = ask(port, "POST", "/v1/chat/completions", json.loads(line[line.index("-d") + 1]))
        assert (status, json.loads(body)["object"]) == (200, "chat.completion")
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0


@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["ready", "loading"])
def test_ctrl_c_ends_with_0(seconds: float) -> None:
    port = free_port()
    with process("--port", str(port), TEST_LOAD_SECONDS=str(seconds)) as child:
        wait_status(port, "/health", 503 if seconds else 200)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=10)
    assert child.returncode == 0
    assert "Traceback" not in err


def test_ctrl_c_before_there_is_a_server_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "parse_flags", interrupted)
    assert api.main([]) == 130


def test_ctrl_c_lets_a_stream_end_and_a_second_one_does_not() -> None:
    for times, status in ((1, 0), (2, 130)):
        port = free_port()
        with process("--port", str(port), TEST_TOKEN_SECONDS="0.05") as child:
            wait_status(port, "/ready", 200)
            answers: list[str] = []
            body = {"model": "echo", "prompt": "abc", "max_tokens": 20, "stream": True}

            def stream(port: int = port, body: Any = body, answers: list[str] = answers) -> None:
                answers.append(ask(port, "POST", "/v1/completions", body)[2])

            client = threading.Thread(target=stream)
            client.start()
            time.sleep(0.3)
            for _ in range(times):
                child.send_signal(signal.SIGINT)
                time.sleep(0.1)
            client.join()
            _, err = child.communicate(timeout=10)
        assert child.returncode == status, err
        assert answers[0].endswith("data: [DONE]\n\n")
        assert ('"finish_reason":"abort"' in answers[0]) is (times == 2)
        assert "Traceback" not in err


def test_a_unix_socket_is_private_and_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with process("--uds", str(path)) as child:
        assert child.stdout is not None
        assert str(path) in child.stdout.readline()
        assert path.stat().st_mode & 0o777 == 0o600
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(path))
            raw.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 200")
        with process("--uds", str(path)) as second:
            _, err = second.communicate(timeout=15)
            assert (second.returncode, err.count("\n")) == (2, 1)
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0
    assert not path.exists()


def test_tls_is_served_with_the_given_certificate(tmp_path: Path) -> None:
    key, certificate, port = tmp_path / "key.pem", tmp_path / "cert.pem", free_port()
    make = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {key} -out {certificate}"
    subject = ["-days", "1", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make.split(), *subject], check=True, capture_output=True)
    context = ssl.create_default_context(cafile=str(certificate))
    flags = ("--ssl-keyfile", str(key), "--ssl-certfile", str(certificate))
    with process("--port", str(port), *flags) as child:
        assert child.stdout is not None
        assert f"https://127.0.0.1:{port}" in child.stdout.readline()
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=10, context=context)
        body = json.dumps({"model": "echo", "prompt": "abc", "max_tokens": 3, "stream": True})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert connection.getresponse().read().endswith(b"data: [DONE]\n\n")
        connection.close()
        child.send_signal(signal.SIGTERM)
        assert child.wait(10) == 0


def test_an_idle_server_rests() -> None:
    port = free_port()
    with process("--port", str(port)) as child:
        assert child.stdout is not None
        child.stdout.readline()  # the start is over: the server says where it is
        before = cpu_seconds(child.pid)
        time.sleep(1.5)
        used = cpu_seconds(child.pid) - before
        assert used <= 0.02 * 1.5
        child.send_signal(signal.SIGTERM)
        child.wait(10)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_front_end_never_imports_torch() -> None:
    code = (
        "import sys, tokenspeed.entrypoints.api, tokenspeed.entrypoints.app, tokenspeed.bench.serve;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False, timeout=30).returncode == 0
