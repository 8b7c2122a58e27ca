"""Grammars of one step moved on: at once where they are few and cheap, in threads otherwise, with the same masks."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from tests.text.grammars.alphabet import COMPILER
from tokenspeed.batch import Finish, Int32Array
from tokenspeed.engine import grammars as engine_side
from tokenspeed.engine.grammars import Constraint, Followed, Taught
from tokenspeed.engine.moves import AT_ONCE_SECONDS, Moves

AMBIGUOUS = {"type": "grammar", "grammar": "root ::= s\ns ::= [a-z ] | s s"}


class Watched:
    """A constraint that notes where it was moved, and may wait until it is let go on."""

    masked = True
    error: str | None = None
    mask: Int32Array | None = None

    def __init__(self, seconds: float, go_on: threading.Event | None = None) -> None:
        self.seconds = seconds
        self.moved: list[tuple[int, threading.Thread]] = []
        self._go_on = go_on

    def move(self, token: int) -> None:
        assert self._go_on is None or self._go_on.wait(30)
        self.moved.append((token, threading.current_thread()))

    def settle(self, finish: int) -> int:
        return finish


def test_few_cheap_rows_move_where_the_step_lands() -> None:
    async def run() -> None:
        rows = [Watched(AT_ONCE_SECONDS / 8) for _ in range(4)]
        await Moves().make([(row, token) for token, row in enumerate(rows)])
        assert [row.moved for row in rows] == [[(token, threading.current_thread())] for token in range(4)]

    asyncio.run(run())


@pytest.mark.parametrize(("number", "seconds"), [(1, 2 * AT_ONCE_SECONDS), (64, AT_ONCE_SECONDS / 8)])
def test_the_loop_goes_on_while_dear_or_many_rows_move(number: int, seconds: float) -> None:
    async def run() -> None:
        go_on = threading.Event()
        rows = [Watched(seconds, go_on) for _ in range(number)]
        making = asyncio.create_task(Moves().make([(row, 7) for row in rows]))
        await asyncio.sleep(0.01)
        assert not making.done()
        go_on.set()  # the loop's doing: it would wait for ever if it made the moves itself
        await making
        assert all(len(row.moved) == 1 and row.moved[0][0] == 7 for row in rows)

    asyncio.run(run())


def test_a_move_that_breaks_is_raised() -> None:
    class Broken(Watched):
        def move(self, token: int) -> None:
            raise RuntimeError("it broke")

    with pytest.raises(RuntimeError, match="it broke"):
        asyncio.run(Moves().make([(Broken(1.0), 0), (Watched(1.0), 0)]))


def test_in_threads_the_masks_are_those_of_one_after_another() -> None:
    patterns = [f"([a-{end}]{{1,9}} )*" for end in "xyz"]
    compiled = [COMPILER.compile(COMPILER.parse({"type": "regex", "pattern": pattern})) for pattern in patterns]

    def rows() -> list[Followed]:
        return [Followed(Taught(compiled[index % 3], seconds=1.0), set()) for index in range(24)]

    async def run() -> None:
        threaded, plain, moves = rows(), rows(), Moves()
        for token in b"ab cd e":
            await moves.make([(row, token) for row in threaded])
            for row in plain:
                row.move(token)
            assert [row.settle(Finish.NONE) for row in threaded] == [row.settle(Finish.NONE) for row in plain]
            for one, other in zip(threaded, plain, strict=True):
                assert one.mask.any() and np.array_equal(one.mask, other.mask)

    asyncio.run(run())


def test_a_grammar_that_takes_too_much_memory_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_side, "FOLLOWED_BYTES", 200_000)
    monkeypatch.setattr(engine_side, "MEASURED_EVERY", 8)
    ambiguous = Followed(Taught(COMPILER.compile(COMPILER.parse(AMBIGUOUS))), set())
    plain = Followed(Taught(COMPILER.compile(COMPILER.parse({"type": "regex", "pattern": "[a-z ]*"}))), set())
    ended = after(ambiguous, 200)
    assert ended < 200 and ambiguous.error is not None and "MiB" in ambiguous.error
    assert after(plain, 200) == 200 and plain.error is None


def after(row: Constraint, longest: int) -> int:
    """How many letters come before a row ends."""
    for number in range(longest):
        row.move(ord("a"))
        if row.settle(Finish.NONE) != Finish.NONE:
            return number
    return longest
