"""What travels between host and device in one step: one copy there, one copy back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.batch import BatchLimits, Int32Array, PlanBuffers
from tokenspeed.executor.interface import Mask
from tokenspeed.executor.masks import num_words

RECORD = np.dtype(
    [
        ("slot", np.int32),
        ("features", np.int32),
        ("top_k", np.int32),
        ("min_length", np.int32),
        ("seed", np.int64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
    ]
)
"""The sampling parameters of a newly bound slot, packed: 12 words of 4 bytes, the seed at an even one."""

RECORD_WORDS = RECORD.itemsize // 4


class Staging(PlanBuffers):
    """The arrays of a plan, and behind them in the same host memory what the executor adds:

    ============  =========  =================================================================
    sample_slot   [R]        slot of each row of the sampler; −1 is padding
    sample_token  [R]        token of the step whose hidden state gives that row's logits
    num_rows      [1]        rows of a decode step without its padding
    records       [R]        `RECORD`s of the slots in `bound`
    ============  =========  =================================================================

    `results` [1 + G, R] int32 receives the faults of the rows, and the tokens of each of G groups of ranks; `clock`
    times the step. `masks` [R, 1 + V/32] int32 has a slot and its mask in each row, which travel by themselves, in
    steps that have any.
    For a GPU it is page-locked, so that copies run beside the host. Everything is reused once the step has landed.
    """

    def __init__(self, limits: BatchLimits, vocab_size: int, device: torch.device, num_groups: int = 1) -> None:
        self._pinned = pinned = device.type == "cuda"
        self.clock = Clock(device)
        super().__init__(limits, self._allocate)
        rows = limits.max_rows
        self.sample_slot: Int32Array = self._extra[:rows]
        self.sample_token: Int32Array = self._extra[rows : 2 * rows]
        self.num_rows: Int32Array = self._extra[2 * rows : 2 * rows + 1]
        words = self._extra[-rows * RECORD_WORDS :]
        self.records: npt.NDArray[np.void] = words.view(RECORD)
        self.results = torch.zeros(1 + num_groups, rows, dtype=torch.int32, pin_memory=pinned)
        self.masks = torch.zeros(rows, 1 + num_words(vocab_size), dtype=torch.int32, pin_memory=pinned)

    def set_masks(self, slots: Sequence[int], masks: Sequence[Mask]) -> None:
        """Write the masks of these slots; None is all ones."""
        rows: Int32Array = self.masks.numpy()
        rows[: len(slots), 0] = slots
        for row, mask in enumerate(masks):
            rows[row, 1:] = -1 if mask is None else mask

    def _allocate(self, num_words: int) -> Int32Array:
        # Records start at an even word, and so at a multiple of the seed's size: torch's memory is aligned far more.
        extra = self.limits.max_rows * (2 + RECORD_WORDS) + 1
        extra += (num_words + extra) % 2
        self.host = torch.zeros(num_words + extra, dtype=torch.int32, pin_memory=self._pinned)
        words: Int32Array = self.host.numpy()
        self._extra = words[num_words:]
        return words[:num_words]


class Clock:
    """Marks in the stream of a device, and the time between them. Made once: an event costs 10 µs."""

    MARKS = 3

    def __init__(self, device: torch.device) -> None:
        self._count = 0
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._stream = torch.cuda.default_stream(device)
            self._events = [
                torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
                for _ in range(self.MARKS)
            ]

    def start(self) -> None:
        """Forget the marks of the last step, and set the first of this one."""
        self._count = 0
        self._times.clear()
        self.mark()

    def mark(self) -> None:
        """Set the next of at most `MARKS` marks behind what is enqueued."""
        if self._events:
            self._events[self._count].record(self._stream)
        else:
            self._times.append(time.perf_counter())
        self._count += 1

    def wait(self) -> list[float]:
        """Wait for the last mark. Seconds between the marks."""
        if not self._events:
            return [end - start for start, end in pairwise(self._times)]
        marks = self._events[: self._count]
        marks[-1].synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


class DevicePlan:
    """A `Staging`'s host memory on the device, array for array; every step is copied to the same place."""

    def __init__(self, staging: Staging, device: torch.device) -> None:
        self._flat = torch.zeros(len(staging.host), dtype=torch.int32, device=device)
        self._base = staging.host.data_ptr()
        self.row_slot = self._like(staging.row_slot)
        self.row_new = self._like(staging.row_new)
        self.row_computed = self._like(staging.row_computed)
        self.token_ids = self._like(staging.token_ids)
        self.table_delta = self._like(staging.table_delta)
        self.sample_slot = self._like(staging.sample_slot)
        self.sample_token = self._like(staging.sample_token)
        self.num_rows = self._like(staging.num_rows)
        words = self._like(staging.records.view(np.int32).reshape(-1, RECORD_WORDS))
        self.records = {name: _column(words, *field[:2]) for name, field in (RECORD.fields or {}).items()}

    def receive(self, staging: Staging) -> None:
        """Enqueue the copy of one step."""
        self._flat.copy_(staging.host, non_blocking=True)

    def _like(self, array: Int32Array) -> torch.Tensor:
        start = (array.ctypes.data - self._base) // 4
        return self._flat[start : start + array.size].view(array.shape)


def _column(words: torch.Tensor, dtype: np.dtype[np.generic], offset: int) -> torch.Tensor:
    """A field of the records [R], as a view."""
    kind = torch.from_numpy(np.zeros(1, dtype)).dtype
    wide = words.view(kind)
    return wide[:, offset // dtype.itemsize]
