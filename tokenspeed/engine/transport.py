"""Frames on a Unix socket: a 4-byte little-endian length, then one msgpack message. Never pickle."""

from __future__ import annotations

import asyncio
from typing import Any, Generic, TypeVar

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
        self._writer.write(len(body).to_bytes(4, "little") + body)

    async def receive(self) -> Message:
        """The next message from the peer."""
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "little")
            if size > MAX_FRAME:
                raise ValueError(f"a frame of {size} bytes exceeds {MAX_FRAME}")
            body = await self._reader.readexactly(size)
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
