"""A scheduler that writes every call that changes it to a file, and what the file holds.

A recording is a sequence of frames, each a length (4 bytes, little-endian) and a MessagePack message: a `Call`
before it is made, its `Answer` after. Each frame is handed to the operating system at once, so that a recording
can be read after the process has died, even inside a call. It holds prompts and the hash key in the clear.
`python -m tokenspeed._core.replay FILE` makes the same calls again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import msgspec
import numpy as np
from msgspec.msgpack import Ext

from tokenspeed import batch
from tokenspeed._core import types
from tokenspeed._core.pools import ControlPlane, Pools
from tokenspeed._core.scheduler import Scheduler
from tokenspeed._core.types import Refusal
from tokenspeed.batch import JointBuffers, JointPlan, Outputs, Plan, PlanBuffers
from tokenspeed.errors import TokenSpeedError

CONSTRUCT = "construct"
ERRORS = (TokenSpeedError, TypeError, OverflowError, MemoryError)
"""What a call may raise; that is an answer like any other."""

LENGTH_BYTES = 4
MAX_FRAME = 1 << 28

_ARRAY, _RECORD, _BUFFERS, _JOINT = 1, 2, 3, 4

T = TypeVar("T")


class NotARecording(TokenSpeedError, ValueError):
    """The file holds something else; the message says where."""


class Call(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """One call of a method, or of the constructor under the name `CONSTRUCT`."""

    method: str
    args: list[Any]
    kwargs: dict[str, Any]

    @staticmethod
    def of(method: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Call:
        """A call as MessagePack can hold it. An argument that cannot be written: TypeError."""
        return Call(method, [_wrap(arg) for arg in args], {name: _wrap(arg) for name, arg in kwargs.items()})


class Answer(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What a call gave back or raised: in words, and a digest of all of it."""

    text: str
    digest: bytes

    @staticmethod
    def of(value: object) -> Answer:
        """The answer that stands for a returned value or a raised exception."""
        hasher = hashlib.blake2b(digest_size=16)
        for part in _content(value):
            hasher.update(len(part).to_bytes(8, "little"))
            hasher.update(part)
        return Answer(_in_words(value), hasher.digest())


def _content(value: object) -> Iterator[bytes]:
    """The bytes that make two answers equal."""
    if isinstance(value, JointPlan):
        yield str(value.step).encode()
        for part in value.parts:
            yield from _content(part)
    elif isinstance(value, (Plan, Outputs)):
        for name in _readable(type(value)):
            yield name.encode()
            yield from _content(getattr(value, name))
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype.str} {value.shape}".encode()
        yield value.tobytes()
    elif isinstance(value, dict):
        yield msgspec.json.encode(value, order="deterministic")
    elif isinstance(value, bytes):
        yield value
    else:
        yield _in_words(value).encode()


def _readable(kind: type) -> list[str]:
    """The fields and properties of a class, without the buffers that a plan's arrays are views of."""
    properties = [name for name, member in vars(kind).items() if isinstance(member, property)]
    return [name for name in [*kind.__annotations__, *properties] if name != "buffers"]


def _in_words(value: object) -> str:
    match value:
        case Plan():
            words = f"step {value.step}: {value.num_rows} rows, {value.num_tokens} tokens"
        case Outputs():
            words = f"outputs for requests {value.request_ids.tolist()}"
        case Scheduler() | Pools():
            words = f"a scheduler for at most {value.max_length} tokens a request"
        case Refusal():
            words = f"refused: {value.name}"
        case BaseException():
            words = f"{type(value).__name__}: {value}"
        case dict():
            words = f"a state with {len(value['requests'])} requests"
        case _:
            words = repr(value)
    return words


# --- arguments ---


def _wrap(value: object) -> object:
    """An argument as MessagePack can hold it."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        header = (value.dtype.str, value.shape, value.flags.c_contiguous, value.tobytes())
        return Ext(_ARRAY, msgspec.msgpack.encode(header))
    if isinstance(value, JointBuffers):
        return Ext(_JOINT, msgspec.msgpack.encode([_wrap(part) for part in value.parts]))
    if isinstance(value, PlanBuffers):
        return Ext(_BUFFERS, msgspec.msgpack.encode(_wrap(value.limits)))
    if is_dataclass(value):
        named = {field.name: _wrap(getattr(value, field.name)) for field in fields(value)}
        return Ext(_RECORD, msgspec.msgpack.encode((type(value).__name__, named)))
    return value


def unwrap(code: int, data: memoryview) -> object:
    """The `ext_hook` of a decoder of calls: an argument as it was."""
    content = msgspec.msgpack.decode(data, ext_hook=unwrap)
    match code:
        case 1:
            dtype, shape, contiguous, raw = content
            array = np.frombuffer(raw, dtype).reshape(shape)
            return array if contiguous else np.repeat(array, 2, axis=-1)[..., ::2]
        case 2:
            name, named = content
            kind = vars(batch).get(name) or vars(types).get(name)
            if not (isinstance(kind, type) and is_dataclass(kind)):
                raise NotARecording(f"there is no record type {name!r}")
            return kind(**named)
        case 3:
            return PlanBuffers(content)
        case 4:
            return JointBuffers(content)
        case _:
            raise NotARecording(f"unknown kind of argument: {code}")


# --- files ---


class Recorder(Protocol):
    """Makes the calls of a scheduler, and keeps them."""

    def record(self, method: str, call: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]) -> T:
        """Make the call and keep it: what it gives or raises is what this does."""
        ...

    def close(self) -> None: ...


class Journal:
    """The file being written. One that exists is never overwritten: `FileExistsError`. Only its owner may read it."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "wb")

    def record(self, method: str, call: Callable[..., T], args: tuple[object, ...], kwargs: dict[str, object]) -> T:
        """Write the call, make it, write its answer. An argument that cannot be written: TypeError, and no call."""
        self._write(Call.of(method, args, kwargs))
        try:
            value = call(*args, **kwargs)
        except ERRORS as error:
            self._write(Answer.of(error))
            raise
        self._write(Answer.of(value))
        return value

    def close(self) -> None:
        self._file.close()

    def _write(self, frame: Call | Answer) -> None:
        message = msgspec.msgpack.encode(frame)
        self._file.write(len(message).to_bytes(LENGTH_BYTES, "little") + message)
        self._file.flush()


class Frames:
    """The frames of a recording, in order. Iterate once; then `torn` says how many bytes of a cut-off frame follow."""

    def __init__(self, path: Path) -> None:
        self.torn = 0
        self._path = path
        self._decoder = msgspec.msgpack.Decoder(Call | Answer, ext_hook=unwrap)

    def __iter__(self) -> Iterator[Call | Answer]:
        with self._path.open("rb") as file:
            number = 0
            while header := file.read(LENGTH_BYTES):
                length = int.from_bytes(header, "little")
                if len(header) == LENGTH_BYTES and length > MAX_FRAME:
                    raise NotARecording(f"frame {number} claims {length} bytes")
                message = file.read(length) if len(header) == LENGTH_BYTES else b""
                if len(header) < LENGTH_BYTES or len(message) < length:
                    self.torn = len(header) + len(message)
                    return
                try:
                    yield self._decoder.decode(message)
                except (msgspec.DecodeError, ValueError, TypeError) as error:
                    raise NotARecording(f"frame {number} is none: {error}") from None
                number += 1


def _recorded(method: str) -> Any:
    def call(self: _Recording, *args: Any, **kwargs: Any) -> Any:
        return self._recorder.record(method, getattr(super(_Recording, self), method), args, kwargs)

    return call


class _Recording:
    """A control plane whose calls are recorded; those that only look are not. Recording a step costs about 0.1 ms.

    Stands before the class whose calls it makes.
    """

    _recorder: Recorder

    @classmethod
    def open(cls, path: Path, **sizes: Any) -> Self:
        """A new one, `sizes` as for the class, recorded to a new file."""
        return cls.through(Journal(path), **sizes)

    @classmethod
    def through(cls, recorder: Recorder, **sizes: Any) -> Self:
        """A new one whose calls are made by `recorder`."""
        made: Self = recorder.record(CONSTRUCT, cls, (), sizes)
        made._recorder = recorder
        return made

    def close(self) -> None:
        """Record the state for comparison, and end the recording."""
        _recorded("dump")(self)
        self._recorder.close()

    submit = _recorded("submit")
    abort = _recorded("abort")
    finish = _recorded("finish")
    plan = _recorded("plan")
    commit = _recorded("commit")
    land_copies = _recorded("land_copies")
    drop_cached = _recorded("drop_cached")


class RecordingScheduler(_Recording, Scheduler):
    """A scheduler that is recorded."""


class RecordingPools(_Recording, Pools):
    """Pools that are recorded, as one."""


Recording = RecordingScheduler | RecordingPools


def recorded_through(recorder: Recorder, *, num_blocks: Sequence[int], **sizes: Any) -> Recording:
    """As `pools.control_plane`, with calls that are made by `recorder`."""
    if len(num_blocks) == 1:
        return RecordingScheduler.through(recorder, num_blocks=num_blocks[0], **sizes)
    return RecordingPools.through(recorder, num_blocks=num_blocks, **sizes)


def constructed(call: Call) -> ControlPlane:
    """What a call of the name `CONSTRUCT` made, anew: it was given the blocks of one pool, or of several."""
    several = isinstance(call.kwargs.get("num_blocks"), (list, tuple))
    return (Pools if several else Scheduler)(*call.args, **call.kwargs)
