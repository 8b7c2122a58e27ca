"""A recording of a scheduler's calls leads to the same states again, and says where it does not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from tokenspeed._core import Misuse, Scheduler
from tokenspeed._core.record import LENGTH_BYTES, Answer, Call, Frames, Journal, NotARecording, RecordingScheduler
from tokenspeed._core.replay import main, replay
from tokenspeed.batch import BatchLimits, Int32Array, Plan, PlanBuffers

LIMITS = BatchLimits(max_rows=4, max_tokens=16, max_blocks=16, block_size=4)
SIZES: dict[str, Any] = {
    "num_blocks": 16,
    "limits": LIMITS,
    "max_model_len": 64,
    "max_queued": 8,
    "prefix_caching": True,
    "hash_key": b"k" * 16,
}


def int32(values: Sequence[int]) -> Int32Array:
    return np.array(values, dtype=np.int32)


class Driver:
    """Calls in shorter words; up to two steps in flight."""

    def __init__(self, core: Scheduler) -> None:
        self.core = core
        self.buffers = [PlanBuffers(LIMITS) for _ in range(2)]
        self.now = 0.0
        self.flights: deque[Plan] = deque()
        self.tickets: list[int] = []

    def submit(self, request_id: int, prompt: Sequence[int], stop: Sequence[int] = (), **wishes: Any) -> None:
        given = {"now": self.now, "max_tokens": None, "stop_ids": int32(stop)}
        self.core.submit(request_id, int32(prompt), **(given | wishes))

    def plan(self) -> None:
        self.now += 0.01
        plan = self.core.plan(self.now, self.buffers[len(self.flights)])
        if plan is not None:
            self.flights.append(plan)
            self.tickets += plan.copies[:, 0].tolist()

    def commit(self, *tokens: int) -> None:
        step = self.flights.popleft().step
        self.core.commit(step, int32(tokens).reshape(-1, 1), np.ones(len(tokens), np.int32), 0.01)

    def land_copies(self, failures: int) -> None:
        tickets, self.tickets = self.tickets, []
        self.core.land_copies(int32(tickets[failures:]), int32(tickets[:failures]))

    def step(self, *tokens: int) -> None:
        self.plan()
        self.commit(*tokens)


def make_random_calls(d: Driver, seed: int, count: int) -> None:
    """Calls of every kind, some of them misuse."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        kind = rng.choice(8, p=(0.2, 0.32, 0.32, 0.04, 0.04, 0.02, 0.03, 0.03))
        if kind == 0:
            prompt = rng.integers(0, 3, rng.integers(0, 24)).tolist()
            d.submit(number, prompt, stop=[2], max_tokens=int(rng.integers(1, 20)), priority=int(rng.integers(-1, 2)))
        elif kind == 1 and len(d.flights) < 2:
            d.plan()
        elif kind == 2 and d.flights:
            d.commit(*rng.integers(-1, 3, d.flights[0].num_samples).tolist())
        elif kind == 3:
            d.core.abort(int(rng.integers(0, number + 1)))
        elif kind == 4:
            with suppress(Misuse):
                d.core.finish(int(rng.integers(0, number + 1)), int(rng.integers(0, 3)))
        elif kind == 5:
            with pytest.raises(Misuse):
                d.core.plan(float("nan"), d.buffers[0])
        elif kind == 6:
            with pytest.raises(Misuse):
                d.core.commit(10**9, int32([1]).reshape(1, 1), int32([1]))
        elif d.tickets:
            d.land_copies(failures=int(rng.integers(0, 2)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "calls"


@pytest.fixture
def recorded(path: Path) -> Path:
    """Two requests, an abort, a refusal and a misuse; 12 calls, the last of which is the dump."""
    recorder = RecordingScheduler.open(path, **SIZES)
    d = Driver(recorder)
    d.submit(1, range(10), max_tokens=5)
    d.submit(2, range(6), stop=[5])
    d.step(3, 4)
    d.submit(2, range(3))
    d.core.abort(1)
    with pytest.raises(Misuse):
        d.core.commit(9, int32([1]).reshape(1, 1), int32([1]))
    d.step(5)
    d.submit(3, [])
    recorder.close()
    return path


def rewrite(path: Path, change: Callable[[list[bytes]], object]) -> None:
    """Change the messages of a recording."""
    rest, messages = path.read_bytes(), []
    while rest:
        end = LENGTH_BYTES + int.from_bytes(rest[:LENGTH_BYTES], "little")
        messages.append(rest[LENGTH_BYTES:end])
        rest = rest[end:]
    change(messages)
    path.write_bytes(b"".join(len(m).to_bytes(LENGTH_BYTES, "little") + m for m in messages))


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_lead_to_the_same_state_again(seed: int, path: Path) -> None:
    recorder = RecordingScheduler.open(path, **SIZES, num_host_blocks=8 * (seed % 2))
    make_random_calls(Driver(recorder), seed, 600)
    state = Answer.of(recorder.dump()).digest
    recorder.close()
    replayed = replay(path, check=True)
    assert replayed.difference is None and replayed.state == state
    assert not replayed.unanswered and not replayed.torn
    methods = {frame.method for frame in Frames(path) if isinstance(frame, Call)}
    expected = {"construct", "submit", "plan", "commit", "abort", "finish", "dump"}
    assert methods == expected | ({"land_copies"} if seed % 2 else set())


def test_a_faithful_replay_exits_with_0_and_prints_calls_and_state(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recorded), "--check"]) == 0
    assert capsys.readouterr().out == f"12 calls, final state {replay(recorded).state.hex()}\n"


def test_every_kind_of_answer_is_recorded_in_words(recorded: Path) -> None:
    texts = [frame.text for frame in Frames(recorded) if isinstance(frame, Answer)]
    assert texts[1:5] == ["None", "None", "step 1: 2 rows, 16 tokens", "outputs for requests [1, 2]"]
    assert texts[5:7] == ["refused: DUPLICATE_ID", "True"]
    assert texts[7].startswith("Misuse: step 9")
    assert texts[-2:] == ["refused: EMPTY", "a state with 0 requests"]


def test_a_recorded_scheduler_answers_as_any_other(path: Path) -> None:
    plain, recorder = Scheduler(**SIZES), RecordingScheduler.open(path, **SIZES)
    for core in (plain, recorder):
        make_random_calls(Driver(core), 1, 300)
    assert plain.dump() == recorder.dump() and plain.stats() == recorder.stats()


def test_the_first_call_that_answers_otherwise_is_named(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def forget_the_abort(messages: list[bytes]) -> None:
        at = next(i for i, message in enumerate(messages) if b"abort" in message)
        del messages[at : at + 2]

    rewrite(recorded, forget_the_abort)
    assert main([str(recorded)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "call 8, plan: recorded step 2: 1 rows, 1 tokens; now step 2: 2 rows, 2 tokens"


def test_arrays_of_a_plan_are_compared_not_only_its_numbers() -> None:
    answers = []
    for start in (0, 1):
        d = Driver(Scheduler(**SIZES))
        d.submit(1, range(start, start + 10))
        d.plan()
        answers.append(Answer.of(d.flights[0]))
    assert answers[0].text == answers[1].text and answers[0].digest != answers[1].digest


def test_a_violation_that_the_scheduler_finds_in_itself_is_named(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(Scheduler):
        def check(self) -> str | None:
            return "a block has two owners" if self.num_unfinished == 2 else None

    monkeypatch.setattr("tokenspeed._core.record.Scheduler", Broken)
    assert main([str(recorded)]) == 0
    assert main([str(recorded), "--check"]) == 1
    assert capsys.readouterr().out.endswith("after call 3, submit: a block has two owners\n")


@pytest.mark.parametrize("lost", [1, 20, 200])
def test_a_frame_cut_off_by_a_crash_is_ignored_and_said(
    lost: int, recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.write_bytes(recorded.read_bytes()[:-lost])
    assert main([str(recorded), "--check"]) == 0
    assert "the last frame is cut off" in capsys.readouterr().out


def test_a_call_in_which_the_process_died_is_made_again(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(recorded, lambda frames: frames.pop())
    assert main([str(recorded)]) == 0
    assert "ends inside its last call\n12 calls" in capsys.readouterr().out


def test_a_call_is_in_the_file_before_it_is_made(path: Path) -> None:
    seen: list[Call | Answer] = []
    journal = Journal(path)
    journal.record("abort", lambda request_id: seen.extend(Frames(path)), (5,), {})
    assert seen == [Call("abort", [5], {})]


def test_an_argument_that_cannot_be_written_is_refused_before_the_call(path: Path) -> None:
    recorder = RecordingScheduler.open(path, **SIZES)
    with pytest.raises(TypeError):
        recorder.submit(1, int32([1]), now=0.0, max_tokens=object(), stop_ids=int32([]))
    assert not recorder.has_work
    recorder.close()
    assert replay(path).calls == 2


def test_arguments_come_back_as_they_were(path: Path) -> None:
    recorder = RecordingScheduler.open(path, **SIZES)
    strided = np.arange(12, dtype=np.int32)[::2]
    for prompt in (strided, np.arange(3, dtype=np.int64), [1, 2], np.ones((1, 1), np.int32)):
        with pytest.raises(Misuse):
            recorder.submit(1, prompt, now=0.0, max_tokens=1, stop_ids=int32([]))
    recorder.abort(np.int64(4))
    recorder.close()
    calls = [frame for frame in Frames(path) if isinstance(frame, Call)]
    assert calls[0].kwargs["limits"] == LIMITS
    assert calls[1].args[1].tolist() == strided.tolist() and not calls[1].args[1].flags.c_contiguous
    assert replay(path).difference is None


def test_a_recording_is_private_and_never_overwritten(path: Path) -> None:
    RecordingScheduler.open(path, **SIZES).close()
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        RecordingScheduler.open(path, **SIZES)


def test_a_scheduler_that_could_not_be_made_is_recorded_too(path: Path) -> None:
    with pytest.raises(Misuse):
        RecordingScheduler.open(path, **(SIZES | {"hash_key": b"short"}))
    replayed = replay(path)
    assert (replayed.calls, replayed.difference, replayed.state) == (1, None, b"")


@pytest.mark.parametrize(
    "content", [b"", b"\x00\x00\x00\x00", b"GGUF" + bytes(40), b"\x05\x00\x00\x00hello", b"\x01\x00\x00\x00\xc0"]
)
def test_a_file_that_is_no_recording_exits_with_2(
    content: bytes, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_bytes(content)
    assert main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_recording_cannot_name_a_method_that_is_no_call(recorded: Path) -> None:
    def add_a_call(messages: list[bytes]) -> None:
        messages[2:2] = [msgspec.msgpack.encode(Call("__reduce__", [], {})), messages[1]]

    rewrite(recorded, add_a_call)
    with pytest.raises(NotARecording, match="no call '__reduce__'"):
        replay(recorded)
