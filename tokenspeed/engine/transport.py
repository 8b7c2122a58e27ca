"""Frames on a Unix socket: a 4-byte little-endian length, then one msgpack message. Never pickle."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec

MAX_FRAME = 256 << 20
"""Bytes. A longer frame is a broken peer, not a request: bodies are bounded at the HTTP door."""

Message = TypeVar("Message")


class Channel(Generic[Message]):
    """One end of the socket. Sends any struct of `messages`, receives those of the given union.

    `receive` raises `EOFError` when the peer is gone and `ValueError` on a malformed frame.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, incoming: Any) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: msgspec.Struct) -> None:
        """Queue one message; to a peer that is gone it is dropped: `receive` is where that is noticed."""
        if self._writer.is_closing():
            return
        body = self._encoder.encode(message)
        self._writer.write(_head(body) + body)

    async def receive(self) -> Message:
        """The next message from the peer."""
        try:
            body = await self._reader.readexactly(_size(await self._reader.readexactly(4)))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise EOFError("the peer closed the socket") from error
        return self._decoder.decode(body)

    async def flush(self) -> None:
        """Wait until what was sent has left this process, or the peer is gone."""
        try:
            await self._writer.drain()
        except ConnectionError:
            return

    def close(self) -> None:
        """Close the socket; what is queued is still sent."""
        self._writer.close()


class Hearing(asyncio.Protocol, Generic[Message]):
    """One end of the socket, like `Channel`, that hands each message to `hear` in the call that brings its bytes.

    No task is woken for a frame. `over` raises what `receive` would, or what `hear` raised; nothing is heard after it.
    """

    def __init__(self, incoming: Any, hear: Callable[[Message], None]) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._hear = hear
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(incoming)
        self._encoder = msgspec.msgpack.Encoder()
        self._rest = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by inheritance

    def send(self, message: msgspec.Struct) -> None:
        """As `Channel.send`."""
        if not self._transport.is_closing():
            body = self._encoder.encode(message)  # with a prompt of 300,000 tokens, 1.2 MB: not copied once more
            self._transport.writelines((_head(body), body))

    def close(self) -> None:
        """Close the socket; what is queued is still sent."""
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self.over.done():
            return
        try:
            self._take(data)
        except Exception as error:
            # Not a rescue: whoever awaits `over` gets it.
            self.over.set_exception(error)

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(EOFError("the peer closed the socket"))

    def _take(self, data: bytes) -> None:
        """Hear every message that is complete."""
        held: bytes | bytearray = data
        if self._rest:
            self._rest += data
            held = self._rest
        start, end = 0, len(held)
        with memoryview(held) as view:
            while end - start >= 4 and start + 4 + (size := _size(view[start : start + 4])) <= end:
                self._hear(self._decoder.decode(view[start + 4 : start + 4 + size]))
                start += 4 + size
        if held is self._rest:
            del self._rest[:start]
        else:
            self._rest += data[start:]


def _head(body: bytes) -> bytes:
    return len(body).to_bytes(4, "little")


def _size(head: bytes | memoryview) -> int:
    size = int.from_bytes(head, "little")
    if size > MAX_FRAME:
        raise ValueError(f"a frame of {size} bytes exceeds {MAX_FRAME}")
    return size
