"""Bytes from rank 0 to every other rank, in order: a connection each, which tells at once when its other end is gone.

Gloo's own sends would do, but for three things: a wait for the next message ends after a timeout, cannot be ended by
the process that waits, and counts as traffic of the group that collectives run in.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import struct
import time
from typing import Protocol

LENGTH = struct.Struct("<q")
HELLO = struct.Struct("<16sq")
"""A key that only ranks of this world know, and which of them it is."""

HELLO_SECONDS = 5.0
"""A rank says who it is as soon as it is connected; somebody who says nothing must not keep the ranks waiting."""

KEEP_ALIVE = {socket.TCP_KEEPIDLE: 30, socket.TCP_KEEPINTVL: 10, socket.TCP_KEEPCNT: 6}
"""A machine that lost its power or its network ends no connection: after 90 s without an answer its end is assumed.
Else a rank would hold its GPU for ever, because it never sends."""

KEY, PORT = "wire/key", "wire/port"


class Store(Protocol):
    """Where ranks find each other: a value that was set is what every rank gets, which waits for it."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...


class Wire:
    """Rank 0 sends, the others receive; each from one thread. `close` from any thread ends both."""

    def __init__(self, peers: dict[int, socket.socket]) -> None:
        """`peers` are connections: rank 0's to all others by rank, another rank's to rank 0 alone."""
        self._peers = peers

    @classmethod
    def connect(cls, store: Store, rank: int, num_ranks: int, address: str, timeout: float) -> Wire:
        """Meet over `store`. Raises `TimeoutError` or another `OSError` if not all ranks connect within `timeout`."""
        if rank:
            key, port = bytes.fromhex(store.get(KEY).decode()), int(store.get(PORT))
            peer = socket.create_connection((address, port), timeout)
            peer.sendall(HELLO.pack(key, rank))
            return cls({0: _ready(peer)})
        key, until = secrets.token_bytes(16), time.monotonic() + timeout
        with socket.create_server((address, 0), family=_family(address), backlog=num_ranks) as server:
            store.set(KEY, key.hex())
            store.set(PORT, str(server.getsockname()[1]))
            peers: dict[int, socket.socket] = {}
            while len(peers) < num_ranks - 1:
                server.settimeout(max(0.001, until - time.monotonic()))
                peer = server.accept()[0]
                other = _announced(peer, key)
                if other is not None:
                    peers[other] = _ready(peer)
        return cls(peers)

    def send(self, data: bytes) -> None:
        """To every other rank. Raises `EOFError` naming one that is gone; others may have got it."""
        message = LENGTH.pack(len(data)) + data
        for rank, peer in self._peers.items():
            try:
                peer.sendall(message)
            except OSError as error:
                raise EOFError(f"rank {rank} is gone: {error.strerror or error}") from error

    def receive(self) -> bytes:
        """The next message, however long it takes. Raises `EOFError` when rank 0 is gone, or this end is closed."""
        try:
            (length,) = LENGTH.unpack(_read(self._peers[0], LENGTH.size))
            return _read(self._peers[0], length)
        except OSError as error:
            raise EOFError(f"rank 0 is gone: {error.strerror or error}") from error

    def close(self) -> None:
        """End the connections, and whatever waits for them. Idempotent."""
        for peer in self._peers.values():
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other end was faster
                continue
            finally:
                peer.close()


def _announced(peer: socket.socket, key: bytes) -> int | None:
    """Which rank has connected; None for somebody else, who is sent away."""
    peer.settimeout(HELLO_SECONDS)
    try:
        given, rank = HELLO.unpack(_read(peer, HELLO.size))
    except OSError:
        given, rank = b"", 0
    if hmac.compare_digest(given, key):
        return int(rank)
    peer.close()
    return None


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _ready(peer: socket.socket) -> socket.socket:
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a step's inputs are small, and must not wait for more
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE.items():
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
    return peer


def _read(peer: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises `ConnectionError` where the stream ends before."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        read = peer.recv_into(view[done:])
        if not read:
            raise ConnectionError("its connection ended")
        done += read
    return bytes(data)
