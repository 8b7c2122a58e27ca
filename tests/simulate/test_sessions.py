"""The file of sessions, the rules of a replay, the token ids of a conversation."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tokenspeed.simulate.generate import generate
from tokenspeed.simulate.sessions import (
    Conversation,
    FreshIds,
    Request,
    Session,
    TraceError,
    Turn,
    apply_rules,
    read_sessions,
    write_sessions,
)


def talk(
    *turns: tuple[int, int, int], start: int = 0, fresh: FreshIds | None = None, shared: bool = False, tool_sys: int = 0
) -> list[Request]:
    """All requests of a session whose turns are (kept, new, output)."""
    session = Session("s", tool_sys, tuple(Turn(kept, new, output, 1.0) for kept, new, output in turns))
    conversation = Conversation(session, start, fresh or FreshIds(), serial=1, shared_system=shared)
    requests = []
    while (request := conversation.next_request()) is not None:
        requests.append(request)
    return requests


def with_output(request: Request) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """The sequence at a turn's end: the simulated device samples positions."""
    end = len(request.prompt) + request.output
    return np.concatenate([request.prompt, np.arange(len(request.prompt), end, dtype=np.int32)])


@pytest.mark.parametrize("name", ["sessions.json", "sessions.json.gz"])
def test_sessions_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    sessions = generate(5, seed=3)
    write_sessions(tmp_path / name, sessions)
    assert read_sessions(tmp_path / name) == sessions


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "at least one"),
        (b'{"id": "a"}', "expected a list"),
        (b'[{"id": "a", "tool_sys": 1, "turns": []}]', "session 0: expected"),
        (b'[{"id": "a", "turns": [[0, 1, 1, 0]]}]', "session 0: expected"),
        (b'[{"id": "a", "tool_sys": 1, "turns": [[0, 1, 1, 0], [0, 1, 1]]}]', "session 0, turn 1: expected"),
        (b'[{"id": "a", "tool_sys": 1, "turns": [[-1, 1, 1, 0]]}]', "session 0, turn 0: expected"),
        (b'[{"id": "a", "tool_sys": 1, "turns": [[0, 0, 1, 0]]}]', "session 0, turn 0: expected"),
        (b'[{"id": "a", "tool_sys": 1, "turns": [[0, 1, 1, NaN]]}]', "session 0, turn 0: expected"),
        (b'[{"id": "a", "tool_sys": 1, "turns": [[0, true, 1, 0]]}]', "session 0, turn 0: expected"),
        (b'[{"id": "a", "tool_sys": 1, "turns": [[0, 1.5, 1, 0]]}]', "session 0, turn 0: expected"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=words) as caught:
        read_sessions(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_a_cut_and_a_plain_file_called_gz_are_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot read .*gone\.json: No such file"):
        read_sessions(tmp_path / "gone.json")
    cut = tmp_path / "cut.json.gz"
    cut.write_bytes(gzip.compress(json.dumps([1] * 100).encode())[:-12])
    with pytest.raises(TraceError, match="no complete gzip"):
        read_sessions(cut)
    plain = tmp_path / "plain.json.gz"
    plain.write_bytes(b"[]")
    with pytest.raises(TraceError, match=r"cannot read .*plain"):
        read_sessions(plain)


def test_long_requests_are_dropped_and_long_pauses_cut() -> None:
    session = Session(
        "s", 10, (Turn(0, 100, 5, 0.0), Turn(64, 100, 5, 61.0), Turn(128, 1_000, 5, 1.0), Turn(64, 64, 0, 60.0))
    )
    (replayed,) = apply_rules([session], max_prompt=200, max_pause=60.0)
    assert replayed.turns == (Turn(0, 100, 5, 0.0), Turn(64, 100, 5, 60.0), Turn(64, 64, 1, 60.0))


def test_what_a_turn_keeps_is_counted_over_the_dropped_requests_before_it() -> None:
    session = Session("s", 10, (Turn(0, 192, 5, 0.0), Turn(64, 1_000, 5, 1.0), Turn(128, 10, 5, 1.0)))
    (replayed,) = apply_rules([session], max_prompt=200)
    assert replayed.turns[1] == Turn(64, 74, 5, 1.0)  # 64 of the 128 come from the request that was never sent


def test_a_session_of_nothing_but_long_requests_is_left_out() -> None:
    assert apply_rules([Session("s", 10, (Turn(0, 201, 5, 0.0),))], max_prompt=200) == []


def test_a_kept_part_has_the_ids_of_prompt_and_output_and_the_rest_is_new() -> None:
    first, second, third = talk((0, 100, 50), (128, 30, 10), (64, 200, 10))
    assert (second.prompt[:128] == with_output(first)[:128]).all()
    assert (third.prompt[:64] == with_output(second)[:64]).all()
    new = np.concatenate([first.prompt, second.prompt[128:], third.prompt[64:]])
    assert len(np.unique(new)) == len(new) and new.min() > max(len(r.prompt) + r.output for r in (first, second, third))


def test_the_first_request_is_cold_wherever_the_session_starts() -> None:
    (first,) = talk((0, 100, 50), (128, 30, 10), start=1)
    assert len(first.prompt) == 158 and first.reusable == 0


def test_nothing_is_reusable_beyond_what_was_computed() -> None:
    requests = talk((0, 100, 28), (128, 30, 10), (640, 30, 10))
    assert [request.reusable for request in requests] == [0, 127, 167]  # the last generated token has no KV
    assert len(requests[2].prompt) == 670


def test_sessions_share_their_system_prompt_only_when_told_to() -> None:
    fresh = FreshIds()
    mine, yours = (talk((0, 100, 5), fresh=fresh, shared=True, tool_sys=40)[0] for _ in range(2))
    assert (mine.prompt[:40] == yours.prompt[:40]).all() and not set(mine.prompt[40:]) & set(yours.prompt[40:])
    assert mine.reusable == 40
    mine, yours = (talk((0, 100, 5), fresh=fresh, tool_sys=40)[0] for _ in range(2))
    assert not set(mine.prompt) & set(yours.prompt) and mine.reusable == 0
