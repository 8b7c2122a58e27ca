"""The one place where the control plane and the device plane meet: plain int32 arrays.

`PlanBuffers` is owned by Python and filled in place by the control plane; `Plan` says how much of it is
filled for one step; `StepResult` is what the device gives back; `Outputs` is what a commit tells the
step loop. Nothing here knows torch, the scheduler or the model.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

ON_DEVICE = -1
"""In `token_ids`: the input id is `last_token[slot]`, known only to the device."""

NO_STEP = -1
"""The number of no step: real ones begin with 0 or above."""

NOT_FINITE = -1
"""In `StepResult.tokens`: the logits of this row held NaN or infinity; no token was sampled."""


class Finish(enum.IntEnum):
    """Why a request ended; NONE while it goes on. Values are shared with csrc/."""

    NONE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    ERROR = 4


@dataclass(frozen=True)
class BatchLimits:
    """The largest step. `max_rows` is also the number of device slots; `max_blocks` the blocks of one request.

    `max_copies` is how many blocks a step may copy between the tiers.
    A plan never needs more table deltas than `max_deltas`: the control plane stops admitting before.
    """

    max_rows: int
    max_tokens: int
    max_blocks: int
    block_size: int
    max_copies: int = 1024

    @property
    def max_deltas(self) -> int:
        """One admission with a full table, plus what every row and every token of a step can add."""
        return self.max_blocks + self.max_rows + -(-self.max_tokens // self.block_size)


class PlanBuffers:
    """The arrays of one step in one flat int32 buffer, so that a device needs one copy.

    All arrays are views of `flat`, contiguous. `R` rows, `T` tokens, `D` deltas as in `BatchLimits`:

    =============  ======  ==================================================================
    row_slot       [R]     device slot of the request
    row_new        [R]     tokens computed in this step (1 = decode); decode rows come first
    row_computed   [R]     tokens already in the KV cache (the host's upper bound)
    token_ids      [T]     input ids, row after row; `ON_DEVICE` = read `last_token[slot]`
    table_delta    [D,3]   (slot, position in the block table, block)
    sample_rows    [R]     rows that produce a token
    bound          [R,2]   (slot, index in the bindings that travel with this step)
    copies         [C,4]   (ticket, direction, from block, to block) of the second tier
    released       [R]     slots whose device state may be cleared
    =============  ======  ==================================================================

    `bound_ids` [R] int64 is for the host only: the request id of each row of `bound`.
    `allocate` gives zeroed host memory for n int32 values (a CUDA executor passes pinned memory).
    """

    def __init__(
        self, limits: BatchLimits, allocate: Callable[[int], Int32Array] | None = None
    ) -> None:
        rows, tokens, deltas = limits.max_rows, limits.max_tokens, limits.max_deltas
        shapes: list[tuple[str, tuple[int, ...]]] = [
            ("row_slot", (rows,)),
            ("row_new", (rows,)),
            ("row_computed", (rows,)),
            ("token_ids", (tokens,)),
            ("table_delta", (deltas, 3)),
            ("sample_rows", (rows,)),
            ("bound", (rows, 2)),
            ("copies", (limits.max_copies, 4)),
            ("released", (rows,)),
        ]
        total = sum(int(np.prod(shape)) for _, shape in shapes)
        self.limits = limits
        self.flat: Int32Array = np.zeros(total, dtype=np.int32) if allocate is None else allocate(total)
        views: dict[str, Int32Array] = {}
        start = 0
        for name, shape in shapes:
            size = int(np.prod(shape))
            views[name] = self.flat[start : start + size].reshape(shape)
            start += size
        self.row_slot = views["row_slot"]
        self.row_new = views["row_new"]
        self.row_computed = views["row_computed"]
        self.token_ids = views["token_ids"]
        self.table_delta = views["table_delta"]
        self.sample_rows = views["sample_rows"]
        self.bound = views["bound"]
        self.copies = views["copies"]
        self.released = views["released"]
        self.bound_ids: Int64Array = np.zeros(rows, dtype=np.int64)


class Plan(msgspec.Struct, frozen=True):
    """One step: how much of each array of `buffers` is filled. The first `num_decode` rows have row_new 1.

    A step may have copies and no rows. What the policy decided is told too: at most `allowed_prompt_tokens` fit beside
    the streams that decode.
    """

    step: int
    buffers: PlanBuffers
    num_rows: int
    num_decode: int
    num_tokens: int
    num_deltas: int
    num_samples: int
    num_bound: int
    num_copies: int
    num_released: int
    allowed_prompt_tokens: int

    @property
    def row_slot(self) -> Int32Array:
        return self.buffers.row_slot[: self.num_rows]

    @property
    def row_new(self) -> Int32Array:
        return self.buffers.row_new[: self.num_rows]

    @property
    def row_computed(self) -> Int32Array:
        return self.buffers.row_computed[: self.num_rows]

    @property
    def token_ids(self) -> Int32Array:
        return self.buffers.token_ids[: self.num_tokens]

    @property
    def table_delta(self) -> Int32Array:
        return self.buffers.table_delta[: self.num_deltas]

    @property
    def sample_rows(self) -> Int32Array:
        return self.buffers.sample_rows[: self.num_samples]

    @property
    def bound(self) -> Int32Array:
        return self.buffers.bound[: self.num_bound]

    @property
    def bound_ids(self) -> Int64Array:
        return self.buffers.bound_ids[: self.num_bound]

    @property
    def copies(self) -> Int32Array:
        return self.buffers.copies[: self.num_copies]

    @property
    def released(self) -> Int32Array:
        return self.buffers.released[: self.num_released]


class JointBuffers(PlanBuffers):
    """Buffers of several pools, whose plans are filled into `parts`; the arrays here then have them beside each other.

    Host memory alone: what a device needs of its pool is copied from that pool's part.
    """

    def __init__(self, parts: Sequence[PlanBuffers]) -> None:
        self.parts = tuple(parts)
        one, count = self.parts[0].limits, len(self.parts)
        super().__init__(
            BatchLimits(
                max_rows=count * one.max_rows,
                max_tokens=count * one.max_tokens,
                max_blocks=count * one.max_blocks,
                block_size=one.block_size,
                max_copies=count * one.max_copies,
            )
        )


class JointPlan(Plan, frozen=True):
    """The plans of several pools as one step: rows are ordered by pool, and in each pool its decode rows come first.

    `parts` are the plans of the pools, each with its own numbers of steps, slots, blocks and tickets; one that has
    nothing to do has an empty plan of step `NO_STEP`. Here pool i's slots follow those of the pools before it
    (i × max_rows), and so do indices in the bindings; of G pools its ticket t is t × G + i, and blocks stay its own.
    """

    parts: tuple[Plan, ...]

    @classmethod
    def of(cls, step: int, plans: Sequence[Plan | None], buffers: JointBuffers) -> Self:
        """`plans` have been filled into the parts of `buffers`, None where there is nothing to do."""
        parts = tuple(plan or Plan(NO_STEP, own, *[0] * 9) for plan, own in zip(plans, buffers.parts, strict=True))
        rows = tokens = deltas = samples = bound = copies = released = 0
        for pool, part in enumerate(parts):
            slot = pool * part.buffers.limits.max_rows
            buffers.row_slot[rows : rows + part.num_rows] = part.row_slot + slot
            buffers.row_new[rows : rows + part.num_rows] = part.row_new
            buffers.row_computed[rows : rows + part.num_rows] = part.row_computed
            buffers.token_ids[tokens : tokens + part.num_tokens] = part.token_ids
            buffers.sample_rows[samples : samples + part.num_samples] = part.sample_rows + rows
            if part.num_deltas:
                table_delta = buffers.table_delta[deltas : deltas + part.num_deltas]
                table_delta[:] = part.table_delta
                table_delta[:, 0] += slot
            if part.num_bound:
                buffers.bound[bound : bound + part.num_bound, 0] = part.bound[:, 0] + slot
                buffers.bound[bound : bound + part.num_bound, 1] = part.bound[:, 1] + bound
                buffers.bound_ids[bound : bound + part.num_bound] = part.bound_ids
            if part.num_copies:
                joint = buffers.copies[copies : copies + part.num_copies]
                joint[:] = part.copies
                joint[:, 0] = part.copies[:, 0] * len(parts) + pool
            if part.num_released:
                buffers.released[released : released + part.num_released] = part.released + slot
            rows, tokens, deltas = rows + part.num_rows, tokens + part.num_tokens, deltas + part.num_deltas
            samples, bound = samples + part.num_samples, bound + part.num_bound
            copies, released = copies + part.num_copies, released + part.num_released
        decode = sum(part.num_decode for part in parts)
        allowed = min(part.allowed_prompt_tokens for part in parts if part.step != NO_STEP)
        return cls(
            step, buffers, rows, decode, tokens, deltas, samples, bound, copies, released, allowed, parts
        )


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities of N positions: the token there, its rank (1 = most likely), the k best.

    `token_ids` [N] int32, `logprobs` [N] float32, `ranks` [N] int32, `top_ids` [N,k] int32,
    `top_logprobs` [N,k] float32. k is the largest any row of the step asked for.
    """

    token_ids: Int32Array
    logprobs: npt.NDArray[np.float32]
    ranks: Int32Array
    top_ids: Int32Array
    top_logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds that the device plane spent on one step: the model's forward, and the sampler."""

    forward: float
    sample: float


@dataclass(frozen=True, slots=True)
class StepResult:
    """What the device gives back for one step.

    `tokens` [S,K] int32 and `num_tokens` [S] int32 follow `sample_rows`; K = 1 without drafts.
    `logprobs` follows `sample_rows` too, None when no row asked. `prompt_logprobs` maps a row of the
    plan to the log-probabilities of its chunk: entry i scores known token `row_computed + i + 1`.
    """

    step: int
    tokens: Int32Array
    num_tokens: Int32Array
    logprobs: Logprobs | None
    prompt_logprobs: dict[int, Logprobs]
    times: StepTimes


OUTPUT_RECORD = np.dtype(
    [
        ("request_id", np.int64),
        ("sample_index", np.int32),
        ("token", np.int32),
        ("num_tokens", np.int32),
        ("finish", np.int32),
        ("stop_id", np.int32),
        ("cached_tokens", np.int32),
    ]
)
"""One entry of `Outputs`, as laid out by csrc/."""

_ENTRY = struct.Struct("=q6i")


class Outputs(msgspec.Struct, frozen=True):
    """What one commit tells the loop, one entry per request that gained a token or ended.

    `records` are the N entries as the control plane wrote them (`OUTPUT_RECORD`), one copy a commit; the arrays are
    read-only views of it, made when they are asked for.

    `request_ids` [N] int64; `sample_index` [N] int32, the entry's index in `sample_rows`, −1 if it
    sampled nothing; `tokens` [N,K] and `num_tokens` [N] int32; `finish` [N] int32 of `Finish`;
    `stop_ids` [N] int32, the stop token id that ended it, −1 if none.
    """

    records: bytes

    def entries(self) -> Iterator[tuple[int, int, int, int, int, int, int]]:
        """The entries one by one: the fields of `OUTPUT_RECORD`. Cheaper than the arrays where each entry is read."""
        return _ENTRY.iter_unpack(self.records)

    def _column(self, name: str) -> npt.NDArray[Any]:
        return np.frombuffer(self.records, OUTPUT_RECORD)[name]

    @property
    def request_ids(self) -> Int64Array:
        return self._column("request_id")

    @property
    def sample_index(self) -> Int32Array:
        return self._column("sample_index")

    @property
    def tokens(self) -> Int32Array:
        return self._column("token")[:, np.newaxis]

    @property
    def num_tokens(self) -> Int32Array:
        return self._column("num_tokens")

    @property
    def finish(self) -> Int32Array:
        return self._column("finish")

    @property
    def stop_ids(self) -> Int32Array:
        return self._column("stop_id")


class CacheChange(enum.IntEnum):
    """What has become of KV blocks for those that look for a prefix. Values are shared with csrc/."""

    STORED = 0
    """One can be found from now on."""
    REMOVED = 1
    """One can be found no more, on no tier."""
    CLEARED = 2
    """None can be found any more."""


CACHE_RECORD = np.dtype([("hash", np.int64), ("parent", np.int64), ("change", np.int32), ("chained", np.int32)])
"""One of `CacheEvents.records`, as laid out by csrc/: `hash` is the low half of a block's, 0 where all are meant;
`parent` is that of the block before it where a stored one is `chained` to one."""

_CACHE_RECORD = struct.Struct("=qqii")


class CacheEvents(msgspec.Struct, tag="cache_events", frozen=True):
    """Which KV blocks of one pool have come to be found, and which no more, in the order in which that came about.

    `records` are N of `CACHE_RECORD`; `token_ids` has those of the stored blocks one after another, int32, as many a
    block as fit one. A block is told as stored again only after it was removed. One may be removed before the blocks
    behind it in its chain.
    """

    pool: int
    records: bytes
    token_ids: bytes

    def entries(self) -> Iterator[tuple[int, int, int, int]]:
        """The records one by one: the fields of `CACHE_RECORD`."""
        return _CACHE_RECORD.iter_unpack(self.records)
