"""The connections from rank 0 to the others, beside whoever else connects to its port."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tokenspeed.parallel import wire
from tokenspeed.parallel.wire import PORT, Wire

HERE = "127.0.0.1"


class Meeting:
    """A store. `announced` is told rank 0's port before any rank is."""

    def __init__(self, announced: Callable[[int], None] = lambda port: None) -> None:
        self._values: dict[str, bytes] = {}
        self._news = threading.Condition()
        self._announced = announced

    def set(self, key: str, value: str, /) -> None:
        if key == PORT:
            self._announced(int(value))
        with self._news:
            self._values[key] = value.encode()
            self._news.notify_all()

    def get(self, key: str, /) -> bytes:
        with self._news:
            assert self._news.wait_for(lambda: key in self._values, 20.0)
            return self._values[key]


def met(store: Meeting, timeout: float = 30.0) -> list[Wire]:
    """Two ranks."""
    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(lambda rank: Wire.connect(store, rank, 2, HERE, timeout), range(2)))


@pytest.mark.parametrize("says", [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(24)], ids=["nothing", "little", "another key"])
def test_a_stranger_at_the_port_does_not_keep_the_ranks_from_meeting(
    says: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HELLO_SECONDS", 0.2)
    strangers: list[socket.socket] = []

    def come(port: int) -> None:
        strangers.append(socket.create_connection((HERE, port), 20.0))
        strangers[0].sendall(says)

    leader, follower = met(Meeting(come))
    leader.send(b"for ranks alone")
    assert follower.receive() == b"for ranks alone"
    assert strangers[0].recv(100) == b"", "sent away, and told nothing"
    for each in (leader, follower, strangers[0]):
        each.close()


def test_strangers_that_keep_coming_do_not_prolong_the_wait_for_a_rank() -> None:
    ended = threading.Event()

    def come(port: int) -> None:
        while not ended.wait(0.05):
            try:
                socket.create_connection((HERE, port), 0.2).close()
            except OSError:
                return

    coming: list[threading.Thread] = []

    def begin(port: int) -> None:
        coming.append(threading.Thread(target=come, args=(port,)))
        coming[0].start()

    try:
        with ThreadPoolExecutor(1) as threads:
            connecting = threads.submit(Wire.connect, Meeting(begin), 0, 2, HERE, 0.5)
            try:
                with pytest.raises(OSError, match="timed out"):
                    connecting.result(15.0)
            finally:
                ended.set()
    finally:
        ended.set()
        coming[0].join()


def test_the_end_of_a_machine_that_says_nothing_any_more_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[socket.socket] = []
    ready = wire._ready

    def watched(peer: socket.socket) -> socket.socket:
        opened.append(peer)
        return ready(peer)

    monkeypatch.setattr(wire, "_ready", watched)
    wires = met(Meeting())
    for peer in opened:
        silent = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        asked = peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        asked *= peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) and silent + asked <= 120
    assert len(opened) == 2
    for each in wires:
        each.close()
