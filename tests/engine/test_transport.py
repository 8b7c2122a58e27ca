"""Frames on a socket, heard in the call that brings their bytes, however these are cut."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import pytest
import uvloop

from tokenspeed.engine.messages import Accepted, ChoiceTokens, EngineStats, FromEngine, Heartbeat, Shutdown, Tokens
from tokenspeed.engine.transport import MAX_FRAME, Hearing

MESSAGES: list[FromEngine] = [
    Accepted(1),
    Tokens([ChoiceTokens(id, [id]) for id in range(200)], EngineStats()),
    Heartbeat(None),
    Tokens([ChoiceTokens(1, list(range(50_000)))], EngineStats()),
    Accepted(2),
]


def framed(message: msgspec.Struct) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    uvloop.run(asyncio.wait_for(work(), 20))


@pytest.mark.parametrize("size", [1, 3, 5, 1000, 1 << 20])
def test_messages_are_heard_whole_and_in_order_however_they_are_cut(size: int) -> None:
    async def work() -> None:
        heard: list[FromEngine] = []
        hearing = Hearing[FromEngine](FromEngine, heard.append)
        data = b"".join(map(framed, MESSAGES))
        for start in range(0, len(data), size):
            hearing.data_received(data[start : start + size])
        assert heard == MESSAGES
        assert not hearing.over.done()

    run(work)


def test_messages_go_both_ways_over_a_socket_until_the_peer_is_gone() -> None:
    async def work() -> None:
        ours, theirs = socket.socketpair()
        heard: list[FromEngine] = []
        loop = asyncio.get_running_loop()
        _, hearing = await loop.create_unix_connection(lambda: Hearing[FromEngine](FromEngine, heard.append), sock=ours)
        reader, writer = await asyncio.open_unix_connection(sock=theirs)
        hearing.send(Shutdown())
        assert await reader.readexactly(len(framed(Shutdown()))) == framed(Shutdown())
        writer.write(b"".join(map(framed, MESSAGES)))
        writer.close()
        with pytest.raises(EOFError):
            await hearing.over
        assert heard == MESSAGES
        hearing.send(Shutdown())
        hearing.close()

    run(work)


@pytest.mark.parametrize("data", [(MAX_FRAME + 1).to_bytes(4, "little"), b"\x02\x00\x00\x00\xc1\xc1"])
def test_what_is_no_frame_ends_the_hearing(data: bytes) -> None:
    async def work() -> None:
        heard: list[FromEngine] = []
        hearing = Hearing[FromEngine](FromEngine, heard.append)
        hearing.data_received(framed(MESSAGES[0]) + data)
        with pytest.raises(ValueError):
            await hearing.over
        hearing.data_received(framed(MESSAGES[0]))
        assert heard == MESSAGES[:1]

    run(work)


def test_what_the_hearer_raises_is_raised_where_the_end_is_awaited() -> None:
    async def work() -> None:
        def hear(message: FromEngine) -> None:
            raise KeyError("broken")

        hearing = Hearing[FromEngine](FromEngine, hear)
        hearing.data_received(framed(MESSAGES[0]) * 2)
        with pytest.raises(KeyError):
            await hearing.over

    run(work)
