"""Clients that are slow, silent, too big, or gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints.fake_engine import TURN, ByteTokenizer
from tests.entrypoints.served import Served, chat, completion, events, serving
from tokenspeed.entrypoints.limits import Limits

FAST = Limits(
    header_seconds=0.3,
    body_seconds=0.4,
    idle_seconds=0.5,
    linger_seconds=0.1,
    keepalive_seconds=0.1,
    reader_seconds=0.3,
    max_body_bytes=200_000,
    total_body_bytes=400_000,
    write_buffer_bytes=64 * 1024,
)
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def impatient() -> Iterator[Served]:
    with serving(limits=FAST, admin_keys=("boss",), max_model_len=1_000_000) as it:
        yield it


@pytest.fixture
def held(impatient: Served) -> Iterator[Served]:
    """The engine admits requests and holds their tokens until the test opens `gate`."""
    impatient.call(impatient.engine.gate.clear)
    yield impatient
    impatient.call(impatient.engine.gate.set)
    impatient.wait_until(lambda: not impatient.engine.streams)


def read_all(raw: socket.socket) -> bytes:
    data = b""
    while part := raw.recv(65536):
        data += part
    return data


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict[str, Any]:
    return dict(json.loads(answer.partition(b"\r\n\r\n")[2])["error"])


def open_request(served: Served, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    data = json.dumps(body).encode()
    raw = served.socket()
    head = HEAD.replace("/v1/completions", path)
    raw.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return raw


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: "])
def test_headers_that_do_not_arrive_in_time_get_408(impatient: Served, sent: bytes) -> None:
    with impatient.socket() as raw:
        raw.sendall(sent)
        began = time.monotonic()
        answer = read_all(raw)
        assert time.monotonic() - began > 0.2
    assert status_of(answer) == 408
    assert error_of(answer)["code"] == "request_timeout"


def test_headers_that_drip_get_408(impatient: Served) -> None:
    with impatient.socket() as raw:
        began = time.monotonic()
        for byte in HEAD.encode() * 20:
            try:
                raw.send(bytes([byte]))
            except OSError:
                break
            time.sleep(0.01)
            if time.monotonic() - began > 0.6:
                break
        assert status_of(read_all(raw)) == 408


def test_a_body_that_does_not_arrive_in_time_gets_408(impatient: Served) -> None:
    with impatient.socket() as raw:
        raw.sendall(f'{HEAD}Content-Length: 1000\r\n\r\n{{"model"'.encode())
        assert status_of(answer := read_all(raw)) == 408
        assert error_of(answer)["code"] == "request_timeout"


def test_a_connection_without_a_next_request_is_closed(impatient: Served) -> None:
    with impatient.socket() as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 200")
        assert read_all(raw) == b""


def test_a_body_over_the_cap_gets_413_before_and_while_it_is_sent(impatient: Served) -> None:
    reply = impatient.post("/v1/completions", completion(prompt="x" * 250_000))
    assert (reply.status, reply.error["code"]) == (413, "too_large")
    with impatient.socket() as raw:
        raw.sendall(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"%x\r\n%b\r\n" % (100_000, b"x" * 100_000)
        raw.sendall(chunk * 2 + b"1\r\nx\r\n")
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")


def test_all_bodies_together_are_bounded(impatient: Served) -> None:
    senders = []
    try:
        for _ in range(4):
            raw = impatient.socket()
            raw.sendall(f"{HEAD}Content-Length: 150000\r\n\r\n".encode() + b" " * 140_000)
            senders.append(raw)
        answers = [status_of(raw.recv(65536)) for raw in senders]
    finally:
        for raw in senders:
            raw.close()
    assert 503 in answers
    assert set(answers) <= {503, 408}
    assert impatient.post("/v1/completions", completion()).status == 200


def test_headers_that_are_too_large_get_431(impatient: Served) -> None:
    with impatient.socket() as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + b"x" * 1_000_000 + b"\r\n\r\n")
        answer = raw.recv(65536)
    assert status_of(answer) == 431
    assert error_of(answer)["code"] == "headers_too_large"


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_what_is_not_http_gets_400_as_json(impatient: Served, sent: bytes) -> None:
    with impatient.socket() as raw:
        raw.sendall(sent)
        answer = read_all(raw)
    assert status_of(answer) == 400
    assert error_of(answer)["code"] == "bad_http"


def test_a_long_silence_before_the_first_token_is_filled_with_comments(held: Served) -> None:
    with open_request(held, completion(stream=True, max_tokens=1)) as raw:
        raw.settimeout(5)
        received = b""
        while received.count(b": keep-alive\n\n") < 2:
            received += raw.recv(65536)
        assert b"data: " not in received
        held.call(held.engine.gate.set)
        while b"[DONE]" not in received:
            received += raw.recv(65536)
    assert received.index(b": keep-alive") < received.index(b"data: ")


def test_no_comment_is_sent_while_tokens_flow(impatient: Served) -> None:
    impatient.call(lambda: setattr(impatient.engine, "delay", 0.03))
    try:
        reply = impatient.post("/v1/completions", completion(stream=True, max_tokens=12))
    finally:
        impatient.call(lambda: setattr(impatient.engine, "delay", 0.0))
    assert "keep-alive" not in reply.text
    assert len(events(reply.text)) == 13


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("prompt", ["hello", ["a", "b", "c"]], ids=["one", "three"])
def test_a_client_that_leaves_before_the_first_token_is_aborted_at_once(
    held: Served, stream: bool, reset: bool, prompt: Any
) -> None:
    held.call(held.engine.aborted.clear)
    raw = open_request(held, completion(stream=stream, prompt=prompt))
    count = 1 if prompt == "hello" else len(prompt)
    held.wait_until(lambda: len(held.engine.streams) == count)
    if reset:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    raw.close()
    held.wait_until(lambda: not held.engine.streams)
    assert len(held.engine.aborted) == count
    held.wait_until(lambda: not held.door.active)


def test_a_client_that_leaves_in_mid_stream_is_aborted(impatient: Served) -> None:
    impatient.call(lambda: setattr(impatient.engine, "delay", 0.01))
    try:
        raw = open_request(impatient, chat(stream=True, max_tokens=5000), "/v1/chat/completions")
        assert b"200 OK" in raw.recv(65536)
        raw.close()
        impatient.wait_until(lambda: not impatient.engine.streams, 1.0)
    finally:
        impatient.call(lambda: setattr(impatient.engine, "delay", 0.0))


def test_a_reader_that_stops_reading_is_cut_off_and_aborted(impatient: Served) -> None:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.connect(("127.0.0.1", impatient.port))
    impatient.call(impatient.engine.aborted.clear)
    data = json.dumps(completion(stream=True, max_tokens=20_000, logprobs=5)).encode()
    raw.sendall(f"{HEAD}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    impatient.wait_until(lambda: bool(impatient.engine.submitted), 2.0)
    impatient.wait_until(lambda: not impatient.door.active, 6.0)
    assert not impatient.engine.streams
    received = b""
    with contextlib.suppress(ConnectionResetError):
        received = read_all(raw)
    assert b"[DONE]" not in received
    raw.close()


def test_hundreds_that_connect_and_leave_leave_nothing_behind(held: Served) -> None:
    held.call(held.engine.aborted.clear)

    def leave() -> None:
        for number in range(50):
            raw = open_request(held, completion(stream=bool(number % 2)))
            raw.close()

    threads = [threading.Thread(target=leave) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held.wait_until(lambda: not held.door.active and not held.engine.streams, 5.0)
    assert held.call(lambda: len(asyncio.all_tasks())) < 20


def test_the_same_client_id_twice_at_once_is_served_twice_and_aborted_together(held: Served) -> None:
    first = open_request(held, completion(request_id="twin", stream=True))
    second = open_request(held, completion(request_id="twin"))
    held.wait_until(lambda: len(held.engine.streams) == 2)
    reply = held.post("/abort_request", {"request_id": "twin"}, Authorization="Bearer boss")
    assert (reply.status, reply.json()) == (200, {"aborted": 2})
    assert b'"finish_reason":"abort"' in read_until(first, b"[DONE]")
    assert b'"finish_reason":"abort"' in second.recv(65536)
    first.close()
    second.close()


def test_an_answers_own_id_aborts_it_and_a_second_time_is_404(held: Served) -> None:
    raw = open_request(held, completion(stream=True))
    head = raw.recv(65536).decode()
    id = next(line.partition(": ")[2] for line in head.split("\r\n") if line.lower().startswith("x-request-id"))
    assert held.post("/abort_request", {"request_id": id}, Authorization="Bearer boss").status == 200
    read_until(raw, b"[DONE]")
    held.wait_until(lambda: not held.door.active)
    reply = held.post("/abort_request", {"request_id": id}, Authorization="Bearer boss")
    assert (reply.status, reply.error["param"]) == (404, "request_id")
    raw.close()


@pytest.mark.parametrize("prompt", ["hello", ["hello", "world"]])
def test_a_request_that_is_still_being_admitted_is_aborted_whole(held: Served, prompt: str | list[str]) -> None:
    held.call(held.engine.admission.clear)
    raw = open_request(held, completion(request_id="early", prompt=prompt))
    held.wait_until(lambda: bool(held.engine.streams))
    reply = held.post("/abort_request", {"request_id": "early"}, Authorization="Bearer boss")
    held.call(held.engine.admission.set)
    assert (reply.status, reply.json()) == (200, {"aborted": 1})
    answer = raw.recv(65536)
    assert answer.count(b'"finish_reason":"abort"') == (1 if prompt == "hello" else 2), answer
    held.wait_until(lambda: not held.door.active and not held.engine.streams)
    raw.close()


LONG = "hello" * 100


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", completion(prompt=LONG, max_tokens=100, prompt_logprobs=20)),
        ("/v1/completions", completion(prompt=LONG, max_tokens=100, logprobs=20)),
        ("/tokenize", {"prompt": LONG * 200, "return_token_strs": True}),
    ],
    ids=["prompt_logprobs", "logprobs", "token_strs"],
)
def test_what_is_long_is_written_beside_the_event_loop(
    path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    writers: set[threading.Thread] = set()
    real = ByteTokenizer.token_bytes

    def token_bytes(self: ByteTokenizer, token_id: int) -> bytes:
        writers.add(threading.current_thread())
        return real(self, token_id)

    with serving(max_model_len=4096) as served:
        loop_thread = served.call(threading.current_thread)
        monkeypatch.setattr(ByteTokenizer, "token_bytes", token_bytes)
        served.engine.script = [TURN] * 100  # hidden, so that only its log-probabilities ask for its text
        assert served.post(path, body).status == 200
    assert writers and loop_thread not in writers


def read_until(raw: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        part = raw.recv(65536)
        assert part, data
        data += part
    return data


def test_an_old_http_client_gets_a_stream_that_ends_with_the_connection(impatient: Served) -> None:
    data = json.dumps(completion(stream=True, max_tokens=2)).encode()
    with impatient.socket() as raw:
        head = HEAD.replace("HTTP/1.1", "HTTP/1.0")
        raw.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        answer = read_all(raw)
    assert b"chunked" not in answer
    assert answer.endswith(b"data: [DONE]\n\n")
