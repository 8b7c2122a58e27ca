"""`python -m tokenspeed._core.replay FILE`: make the calls of a recording again and compare every answer.

Exits with 0 if all answers are the same, with 1 at the first that differs (or, with --check, at the first violation
that the scheduler finds in itself), and with 2 if the file is no recording.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenspeed._core.pools import ControlPlane, Pools
from tokenspeed._core.record import CONSTRUCT, ERRORS, Answer, Call, Frames, NotARecording, constructed
from tokenspeed._core.scheduler import Scheduler

METHODS = ("submit", "abort", "finish", "plan", "commit", "land_copies", "drop_cached", "dump")


@dataclass(frozen=True)
class Replayed:
    """How a replay went. `difference` is in words, None if there is none; `state` is the digest of the last dump.

    `unanswered`: the recording ends inside its last call, which was made again all the same. `torn` counts the bytes
    of a frame that was cut off at the end.
    """

    calls: int
    difference: str | None
    state: bytes
    unanswered: bool
    torn: int


def replay(path: Path, *, check: bool = False) -> Replayed:
    """Rebuild the scheduler of a recording and make its calls until one answers otherwise. `NotARecording`."""
    frames = Frames(path)
    scheduler: ControlPlane | None = None
    calls = 0
    difference = None
    answered = True
    for call, recorded in _pairs(frames):
        calls += 1
        answered = recorded is not None
        if (scheduler is None) != (call.method == CONSTRUCT):
            raise NotARecording(f"call {calls} is {call.method}, but a recording constructs one scheduler first")
        given, made = _make(call, scheduler)
        scheduler = made or scheduler
        if recorded is not None and given.digest != recorded.digest:
            difference = f"call {calls}, {call.method}: recorded {recorded.text}; now {given.text}"
        elif check and scheduler is not None and (violation := scheduler.check()) is not None:
            difference = f"after call {calls}, {call.method}: {violation}"
        if difference is not None or scheduler is None:
            break
    if not calls:
        raise NotARecording("it holds no call")
    state = Answer.of(scheduler.dump()).digest if scheduler is not None else b""
    return Replayed(calls, difference, state, not answered, frames.torn)


def _pairs(frames: Iterable[Call | Answer]) -> Iterator[tuple[Call, Answer | None]]:
    """Each call with its answer; the last may have none."""
    call: Call | None = None
    for frame in frames:
        if isinstance(frame, Call) != (call is None):
            raise NotARecording("calls and answers do not alternate")
        if isinstance(frame, Call):
            call = frame
        elif call is not None:
            yield call, frame
            call = None
    if call is not None:
        yield call, None


def _make(call: Call, scheduler: ControlPlane | None) -> tuple[Answer, ControlPlane | None]:
    """The answer to a call, and the scheduler, or the pools, if it was constructed."""
    method: Callable[[], object]
    if scheduler is None:
        method = functools.partial(constructed, call)
    elif call.method in METHODS:
        method = functools.partial(getattr(scheduler, call.method), *call.args, **call.kwargs)
    else:
        raise NotARecording(f"there is no call {call.method!r}")
    try:
        value: object = method()
    except ERRORS as error:
        value = error
    return Answer.of(value), value if isinstance(value, Scheduler | Pools) else None


def main(arguments: list[str] | None = None) -> int:
    """Replay one file and say how it went; the return value is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenspeed._core.replay", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="let the scheduler recount itself after each call")
    options = parser.parse_args(arguments)
    try:
        replayed = replay(options.file, check=options.check)
    except (NotARecording, OSError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 2
    if replayed.torn:
        print(f"the last frame is cut off: {replayed.torn} bytes are ignored")
    if replayed.unanswered:
        print("the recording ends inside its last call")
    print(f"{replayed.calls} calls, final state {replayed.state.hex()}")
    if replayed.difference is None:
        return 0
    print(replayed.difference)
    return 1


if __name__ == "__main__":
    sys.exit(main())
