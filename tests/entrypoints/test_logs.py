"""Log lines: JSON objects with the request's id, exceptions that nobody caught included, and no text of anybody."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints.served import Served, chat, completion, events, serving
from tests.entrypoints.test_server_process import REPOSITORY, ask, free_port, process, wait_status
from tokenspeed.logs import configure_logging


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What this process logs as JSON while a test runs."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, sys.excepthook, threading.excepthook)
    configure_logging("info", "json", role="api")
    written = io.StringIO()
    handler = root.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(written)
    yield written
    root.handlers[:], level, sys.excepthook, threading.excepthook = before
    root.setLevel(level)
    logging.captureWarnings(False)


def parsed(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_every_line_of_a_server_is_an_object_and_has_the_requests_id() -> None:
    port = free_port()
    with process("--port", str(port), "--log-format", "json") as child:
        wait_status(port, "/ready", 200)
        body = {"model": "echo", "prompt": "a secret of mine", "max_tokens": 2, "flux": 1, "request_id": "mine-7"}
        assert ask(port, "POST", "/v1/completions", body)[0] == 200
        status, headers, _ = ask(port, "POST", "/v1/completions", {**body, "cache_salt": "bug", "request_id": "mine-8"})
        assert (status, headers["X-Request-Id"]) == (500, "mine-8")
        child.send_signal(signal.SIGTERM)
        _, err = child.communicate(timeout=15)
    entries = [json.loads(line) for line in err.splitlines()]
    assert all({"time", "level", "role", "logger", "message"} <= set(entry) for entry in entries)
    of_ours = [entry["message"] for entry in entries if entry.get("request_id") == "mine-7"]
    assert any("flux" in message for message in of_ours)
    assert any("/v1/completions" in message and " 200 " in message for message in of_ours)
    (bug,) = [entry for entry in entries if "exception" in entry]
    assert (bug["level"], bug["request_id"]) == ("error", "mine-8")
    assert "ZeroDivisionError" in bug["exception"]
    assert "secret" not in err


def test_a_start_that_cannot_work_is_an_object_too() -> None:
    with process("--port", "0", "--log-format", "json", TEST_LOAD_ERROR="m.gguf is truncated") as child:
        _, err = child.communicate(timeout=15)
    assert child.returncode == 2
    assert [json.loads(line)["message"] for line in err.splitlines()][-1] == "m.gguf is truncated"


def test_an_exception_that_nobody_caught_is_a_line_too() -> None:
    code = (
        "import threading; from tokenspeed.logs import configure_logging; configure_logging('info', 'json', role='x');"
        "thread = threading.Thread(target=lambda: 1 // 0); thread.start(); thread.join(); import warnings;"
        "warnings.warn('careful'); [][0]"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False, capture_output=True, text=True)
    thread, warning, end = (json.loads(line) for line in done.stderr.splitlines())
    assert done.returncode == 1
    assert "ZeroDivisionError" in thread["exception"] and "IndexError" in end["exception"]
    assert "careful" in warning["message"]


def test_keys_and_texts_stay_out_of_the_log(lines: io.StringIO) -> None:
    with serving(user_keys=("sk-private",)) as served:
        served.post("/v1/chat/completions", chat(flux="confidential"), Authorization="Bearer sk-private")
        served.post("/v1/chat/completions", chat(temperature="confidential"), Authorization="Bearer sk-private")
        served.post("/v1/chat/completions", chat(), Authorization="Bearer sk-wrong")
    logged = lines.getvalue()
    assert [entry["message"].split()[2] for entry in parsed(lines) if "POST" in entry["message"]] == [
        "200", "400", "401",
    ]  # fmt: skip
    assert "sk-" not in logged and "confidential" not in logged and "hello" not in logged


@pytest.mark.parametrize("label", ["trace-1", None, "two words", "x" * 200])
def test_every_answer_has_a_request_id_the_clients_own_if_it_can_be_one(served: Served, label: str | None) -> None:
    own = label is not None and label == "trace-1"
    headers = {} if label is None else {"X_Request_Id": label}
    for reply in (
        served.get("/health", **headers),
        served.get("/v1/models", **headers),
        served.get("/nothing", **headers),
        served.post("/v1/completions", completion(temperature=-1), **headers),
        served.post("/v1/messages", {}, **headers),
        served.post("/abort_request", {}, **headers),
        served.post("/v1/completions", completion(), **headers),
        served.post("/v1/completions", completion(stream=True), **headers),
    ):
        id = reply.headers["x-request-id"]
        assert (id == label) is own
        assert 1 <= len(id) <= 128 and " " not in id


def test_without_a_label_the_id_is_the_answers_own(served: Served) -> None:
    reply = served.post("/v1/completions", completion(stream=True))
    assert reply.headers["x-request-id"] == events(reply.text)[0]["id"]
