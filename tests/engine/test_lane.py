"""A lane sends exactly the bytes of its event, and leaves to the long way all that it is not sure of."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator

import pytest
from msgspec.json import encode

from tokenspeed.batch import Finish
from tokenspeed.engine.lane import Frame, Gaps, Lane, Outlet, Pieces, Way, carry
from tokenspeed.engine.messages import ChoiceTokens
from tokenspeed.engine.observe import Histogram
from tokenspeed.request import TokenLogprob
from tokenspeed.text.parsers.source import Plain
from tokenspeed.text.parsers.tool_parser import quoted

CHARACTERS = [chr(code) for code in range(128)]
WORDS = ["hello", " wörld", "日本", "👋", r"\n", r"a\"b", "\\", 'x"', "<", "\n", "long" * 1000, r"\\"]
TEXTS = dict(enumerate([*CHARACTERS, *WORDS, "<|special|>", ""]))
SPECIAL, EMPTY = len(TEXTS) - 2, len(TEXTS) - 1
PARTS = [b"\xe6\x97", b"\xa5", b"\xe6", b"\x97\xa5\xe6", b"\xa5 and <", b"\xff"]
FIRST = len(TEXTS)
TABLE = {id: text.encode() for id, text in TEXTS.items()} | dict(enumerate(PARTS, FIRST))
BOUNDS = (0.001, 0.01, 0.1)


class Transport:
    """One that remembers what it was given, or lets the socket of another one show through."""

    def __init__(self, socket: socket.socket | None = None, tls: bool = False) -> None:
        self._extra = {"socket": socket, "sslcontext": object() if tls else None}
        self.written = b""
        self.waiting = 0
        self.closing = False

    def get_extra_info(self, name: str) -> object:
        return self._extra[name]

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def write(self, data: bytes) -> None:
        if self.closing:
            raise RuntimeError("closed")
        self.written += data
        self.waiting += len(data)


@pytest.fixture(scope="module")
def pieces() -> Pieces:
    return Pieces(TABLE, {SPECIAL}, len(TABLE))


class World:
    """A choice's lane to a transport, opened for what a `Plain` allows."""

    def __init__(self, pieces: Pieces, transport: Transport, *, stops: str = "", chunked: bool = False) -> None:
        self.transport = transport
        self.token_ids: list[int] = []
        self.lane = Lane(pieces, self.token_ids, stops)
        self.outlet = Outlet(transport, chunked, 10_000)
        self.gaps = Gaps(BOUNDS)
        self.failed: list[ChoiceTokens] = []

    def open(self, frame: Frame | None = None, plain: Plain | None = None, *, inside: bool = False) -> None:
        plain = plain or Plain()
        frame = frame or Frame(b"<", b">")
        self.lane.open(Way(frame, plain.but, plain.escapes, inside), self.outlet, self.gaps, b"", 1.0, 41)

    def carry(self, *token_ids: int, now: float = 1.0, **gained: object) -> bool:
        item = ChoiceTokens(7, list(token_ids), **gained)  # type: ignore[arg-type]
        return not carry([item], {7: self.lane}, now, self.failed.append)


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


def test_an_event_is_its_frame_around_the_text_as_json(pieces: Pieces) -> None:
    for token_id, text in TEXTS.items():
        for inside in (False, True):
            world = World(pieces, Transport())
            world.open(inside=inside)
            if world.carry(token_id):
                expected = encode(quoted(text) if inside else text)
                assert world.transport.written == b"<" + expected + b">"
                assert world.token_ids == [token_id]
            else:
                assert token_id in (SPECIAL, EMPTY)
                assert not world.transport.written and not world.token_ids


def test_what_a_lane_takes_is_what_its_plain_allows(pieces: Pieces) -> None:
    source = random.Random(3)
    for _ in range(300):
        but = "".join(source.sample([*CHARACTERS, "é", "日"], source.randrange(6)))
        plain = Plain(but, escapes=source.random() < 0.5)
        stops = "".join(source.sample(CHARACTERS, source.randrange(3)))
        world = World(pieces, Transport(), stops=stops)
        for token_id in source.sample(range(SPECIAL), 20):
            world.transport.waiting = 0
            world.open(plain=plain)
            text = TEXTS[token_id]
            allowed = plain.allows(text) and Plain(stops).allows(text)
            taken = world.carry(token_id)
            if any(ord(character) > 127 for character in but) and not text.isascii():
                assert allowed or not taken  # beyond ASCII all characters count as one
            else:
                assert taken == allowed, (text, plain, stops)


def test_a_chunk_has_its_size_and_an_event_its_number_and_ids(pieces: Pieces) -> None:
    world = World(pieces, Transport(), chunked=True)
    world.open(Frame(b"data: ", b"}\n\n", numbered=b",", ids=b",ids:"))
    assert world.carry(128) and world.carry(128, 129)
    first, second = b'data: 41,"hello",ids:[128]}\n\n', 'data: 42,"hello wörld",ids:[128,129]}\n\n'.encode()
    assert world.transport.written == b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in (first, second))
    assert (world.lane.close(), world.lane.num_events) == (3, 2)


def test_events_longer_than_the_lanes_own_room_are_whole(pieces: Pieces) -> None:
    world = World(pieces, Transport(), chunked=True)
    world.open()
    long = next(id for id, text in TEXTS.items() if text == "long" * 1000)
    assert world.carry(long, 128)
    event = b'<"' + b"long" * 1000 + b'hello">'
    assert world.transport.written == b"%x\r\n%b\r\n" % (len(event), event)


def test_whatever_is_not_plain_text_is_left_to_the_long_way(pieces: Pieces) -> None:
    world = World(pieces, Transport())
    assert not world.carry(128), "a lane is closed at first"
    world.open()
    assert not world.carry(128, finish=Finish.LENGTH)
    assert not world.carry(128, logprobs=[TokenLogprob(128, -1.0, 1)])
    assert not world.carry()
    assert not world.carry(*[128] * 9)
    assert not world.carry(len(TABLE)) and not world.carry(-1)
    assert not world.carry(128, FIRST)
    assert world.carry(128)
    world.transport.waiting = 10_001
    assert not world.carry(128)
    world.transport.waiting = 0
    world.transport.closing = True
    assert not world.carry(128)
    assert (world.token_ids, world.lane.close(), world.failed) == ([128], 1, [])
    world.transport.closing = False
    assert not world.carry(128), "a lane that was closed"


def test_characters_are_sent_when_they_are_whole(pieces: Pieces) -> None:
    start, end, one, across, text, bad = range(FIRST, FIRST + len(PARTS))
    world = World(pieces, Transport())
    world.open(plain=Plain("<"))
    assert world.carry(start) and not world.transport.written
    assert world.carry(end) and world.transport.written == '<"日">'.encode()
    assert world.carry(one) and world.carry(across)
    assert world.transport.written == '<"日"><"日">'.encode()
    assert not world.carry(text, now=2.0), "what it completes has a character that may not pass"
    assert not world.carry(bad) and not world.carry(128) and not world.carry(start, end)
    assert world.token_ids == [start, end, one, across]
    assert (world.lane.close(), world.lane.num_events) == (4, 2)


def test_a_lane_goes_on_with_the_rest_of_a_character(pieces: Pieces) -> None:
    world = World(pieces, Transport())
    world.lane.open(Way(Frame(b"<", b">"), "", False), world.outlet, world.gaps, b"\xe6\x97", 1.0, 0)
    assert world.carry(FIRST + 1)
    assert world.transport.written == '<"日">'.encode()


def test_parts_of_characters_go_the_long_way_where_every_token_is_told(pieces: Pieces) -> None:
    world = World(pieces, Transport())
    world.open(Frame(b"<", b">", ids=b"|"))
    assert not world.carry(FIRST)


def test_an_empty_transport_is_passed_by(
    pieces: Pieces, ends: tuple[socket.socket, socket.socket]
) -> None:
    world = World(pieces, Transport(ends[0]))
    world.open()
    assert world.carry(128)
    assert (ends[1].recv(100), world.transport.written) == (b'<"hello">', b"")


@pytest.mark.parametrize("tls", [False, True])
def test_what_waits_in_the_transport_is_not_overtaken(
    tls: bool, pieces: Pieces, ends: tuple[socket.socket, socket.socket]
) -> None:
    world = World(pieces, Transport(ends[0], tls))
    if not tls:
        world.transport.write(b"before")
    world.open()
    assert world.carry(128)
    assert world.transport.written.endswith(b'<"hello">')
    ends[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        ends[1].recv(1)


def test_what_the_socket_has_no_room_for_goes_to_the_transport(
    pieces: Pieces, ends: tuple[socket.socket, socket.socket]
) -> None:
    world = World(pieces, Transport(ends[0]))
    world.open(Frame(b"h" * 5000, b"t" * 5000))
    sent = 0
    while not world.transport.written:
        assert world.carry(128)
        sent += 1
        assert sent < 10_000
    ends[1].setblocking(False)
    arrived = b""
    while len(arrived) < sent * 10_007 - len(world.transport.written):
        arrived += ends[1].recv(1 << 20)
    assert arrived + world.transport.written == (b"h" * 5000 + b'"hello"' + b"t" * 5000) * sent


def test_a_connection_that_is_broken_is_left_to_the_transport(
    pieces: Pieces, ends: tuple[socket.socket, socket.socket]
) -> None:
    world = World(pieces, Transport(ends[0]))
    world.open()
    ends[1].close()
    assert not world.carry(128)
    assert not world.token_ids and not world.failed


def test_what_raises_ends_its_own_choice_alone(pieces: Pieces) -> None:
    class Broken(Transport):
        def write(self, data: bytes) -> None:
            raise RuntimeError("broken")

    broken, whole = World(pieces, Broken()), World(pieces, Transport())
    broken.open()
    whole.open()
    items = [ChoiceTokens(1, [128]), ChoiceTokens(2, [128]), ChoiceTokens(3, [128])]
    failed: list[int] = []
    rest = carry(items, {1: broken.lane, 2: whole.lane}, 1.0, lambda item: failed.append(item.id))
    assert ([item.id for item in rest], failed, whole.token_ids) == ([3], [1], [128])


def test_gaps_are_counted_as_a_histogram_counts_them(pieces: Pieces) -> None:
    world, histogram = World(pieces, Transport()), Histogram.of(BOUNDS)
    world.open()
    now = 1.0
    for gap, count in ((0.0005, 1), (0.001, 1), (0.05, 2), (0.3, 1), (0.011, 3)):
        now += gap
        assert world.carry(*[128] * count, now=now)
        histogram.observe(gap / count, count)
    counts, total = world.gaps.take()
    assert counts[1:] == histogram.counts[1:] and total == pytest.approx(histogram.total)
    assert world.lane.last == world.outlet.last_sent == now
    assert world.gaps.take() == ([0] * 4, 0.0)
