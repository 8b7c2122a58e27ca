"""Steps of several groups of ranks, each with a KV pool of its own: a rank computes its group's part of a joint plan.

Whatever the groups have to agree on, numbers that tensors are padded to and whether a step is a graph, follows from
the joint plan, which every rank has. Log-probabilities are told to rank 0, which alone answers requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from tokenspeed.batch import JointBuffers, JointPlan, Logprobs, Plan, PlanBuffers, StepResult
from tokenspeed.errors import InvariantBroken
from tokenspeed.executor.interface import Beside, Binding, Flight, Mask, Peers
from tokenspeed.executor.masks import MaskedSlots
from tokenspeed.executor.prompt_scores import PromptScores


class PartExecutor(Protocol):
    """An executor of one group's part of each step; see `Executor`."""

    @property
    def num_blocks(self) -> int: ...

    def launch(self, plan: Plan, bindings: Sequence[Binding], beside: Beside | None = None) -> Flight: ...

    def new_buffers(self) -> PlanBuffers: ...

    def close(self) -> None: ...


class JointExecutor:
    """An `Executor` of joint plans on one rank, whose own part `executor` computes. All ranks launch the same."""

    def __init__(self, executor: PartExecutor, peers: Peers, num_blocks: Sequence[int]) -> None:
        """`num_blocks` are those of all pools."""
        self._executor = executor
        self._group, self._decides = peers.group, peers.decides
        self._pools = tuple(num_blocks)
        self._masked = MaskedSlots()
        self._scored, self._asking = _Slots(), _Slots()
        self.close = executor.close

    @property
    def num_blocks(self) -> int:
        """In all pools."""
        return sum(self._pools)

    def new_buffers(self) -> JointBuffers:
        own = self._executor.new_buffers()
        return JointBuffers(
            [own if group == self._group else PlanBuffers(own.limits) for group in range(len(self._pools))]
        )

    def launch(self, plan: Plan, bindings: Sequence[Binding]) -> Flight:
        if not isinstance(plan, JointPlan) or len(plan.parts) != len(self._pools):
            raise InvariantBroken(f"a step of {len(self._pools)} groups needs a plan of as many pools")
        masked = self._masked.launched(plan, bindings)
        scored = self._scored.launched(plan, [_scored_prompt(binding) for binding in bindings])
        asking = self._asking.launched(plan, [binding.params.logprobs is not None for binding in bindings])
        whole = tells = False
        if scored or asking:  # what most steps need no look at their rows for
            slots, computed = plan.row_slot.tolist(), plan.row_computed.tolist()
            whole = any(scored.get(slot, 0) > done + 1 for slot, done in zip(slots, computed, strict=True))
            tells = whole or not asking.keys().isdisjoint(slots)
        part = plan.parts[self._group]
        first = sum(before.num_bound for before in plan.parts[: self._group])
        own = bindings[first : first + part.num_bound]
        if not self._decides:
            own = [dataclasses.replace(binding, masked=False) for binding in own]
        flight = self._executor.launch(part, own, _beside(plan, whole=whole, tells=tells))
        per_pool = part.buffers.limits.max_rows
        return _JointFlight(flight, masked, range(self._group * per_pool, (self._group + 1) * per_pool), plan.step)


class _JointFlight:
    """A step of all groups; `masked` are joint slots, of which this rank's own are in `own`."""

    __slots__ = ("_flight", "_own", "_step", "masked")

    def __init__(self, flight: Flight, masked: Sequence[int], own: range, step: int) -> None:
        self._flight, self._own, self._step = flight, own, step
        self.masked = masked

    def mask(self, masks: Sequence[Mask]) -> None:
        own = [mask for slot, mask in zip(self.masked, masks, strict=True) if slot in self._own]
        self._flight.mask(own[: len(self._flight.masked)])

    async def tokens(self) -> StepResult:
        return dataclasses.replace(await self._flight.tokens(), step=self._step)


class _Slots:
    """Joint slots of requests with some property that is not 0, as of the last step that was launched."""

    def __init__(self) -> None:
        self._of: dict[int, int] = {}

    def launched(self, plan: JointPlan, of_bindings: Sequence[int]) -> dict[int, int]:
        """With the next step, whose bindings have these."""
        for slot in plan.released.tolist() if self._of else ():
            self._of.pop(slot, None)
        for slot, at in plan.bound.tolist():
            self._of.pop(slot, None)
            if of_bindings[at]:
                self._of[slot] = of_bindings[at]
        return self._of


def _scored_prompt(binding: Binding) -> int:
    """The length of a prompt that is scored, 0 where none is."""
    return 0 if PromptScores.of(binding) is None else binding.prompt_len


def _beside(plan: JointPlan, *, whole: bool, tells: bool) -> Beside:
    parts = plan.parts
    return Beside(
        tokens=max(part.num_tokens for part in parts),
        rows=max(part.num_rows for part in parts),
        num_rows=tuple(part.num_rows for part in parts),
        samples=tuple(part.num_samples for part in parts),
        decode=0 < plan.num_rows == plan.num_decode,
        whole=whole,
        tells=tells,
    )


class _Scores(msgspec.Struct, array_like=True):
    """`Logprobs` as they are told: the raw bytes of its arrays for N positions with k best each."""

    n: int
    k: int
    token_ids: bytes
    logprobs: bytes
    ranks: bytes
    top_ids: bytes
    top_logprobs: bytes

    @classmethod
    def of(cls, scores: Logprobs) -> _Scores:
        arrays = (getattr(scores, field.name).tobytes() for field in dataclasses.fields(Logprobs))
        return cls(*scores.top_ids.shape, *arrays)

    def read(self) -> Logprobs:
        def ints(data: bytes) -> npt.NDArray[np.int32]:
            return np.frombuffer(data, np.int32)

        def floats(data: bytes) -> npt.NDArray[np.float32]:
            return np.frombuffer(data, np.float32)

        shape = (self.n, self.k)
        return Logprobs(
            ints(self.token_ids), floats(self.logprobs), ints(self.ranks), ints(self.top_ids).reshape(shape),
            floats(self.top_logprobs).reshape(shape),
        )  # fmt: skip


class _Told(msgspec.Struct, array_like=True):
    """What a group tells of one step: `samples` follow its samples, `prompts` are by its rows."""

    samples: _Scores | None
    prompts: dict[int, _Scores]


_decode = msgspec.msgpack.Decoder(_Told).decode


def told_by_all(result: StepResult, beside: Beside, peers: Peers) -> StepResult:
    """`result` with the log-probabilities of all groups in place of this rank's own, as if all rows were one plan's, on
    rank 0; without any on the others. On the host, once for each step that `tells`, in the order of the steps."""
    own = _Told(
        None if result.logprobs is None else _Scores.of(result.logprobs),
        {row: _Scores.of(scores) for row, scores in result.prompt_logprobs.items()},
    )
    everyone = [_decode(data) for data in peers.told(msgspec.msgpack.encode(own))]
    if not everyone:
        return dataclasses.replace(result, logprobs=None, prompt_logprobs={})
    prompts: dict[int, Logprobs] = {}
    first = 0
    for told, rows in zip(everyone, beside.num_rows, strict=True):
        prompts |= {first + row: scores.read() for row, scores in told.prompts.items()}
        first += rows
    samples = _joined([told.samples for told in everyone], beside.samples)
    return dataclasses.replace(result, logprobs=samples, prompt_logprobs=prompts)


def _joined(parts: Sequence[_Scores | None], samples: Sequence[int]) -> Logprobs | None:
    """Of the samples of all groups, those that asked for nothing with rank 0; None where nobody asked."""
    if all(part is None for part in parts):
        return None
    total, k = sum(samples), max(part.k for part in parts if part is not None)
    joint = Logprobs(
        np.zeros(total, np.int32), np.zeros(total, np.float32), np.zeros(total, np.int32),
        np.zeros((total, k), np.int32), np.zeros((total, k), np.float32),
    )  # fmt: skip
    first = 0
    for part, count in zip(parts, samples, strict=True):
        if part is not None:
            scores, own = part.read(), slice(first, first + count)
            joint.token_ids[own], joint.logprobs[own] = scores.token_ids, scores.logprobs
            joint.ranks[own] = scores.ranks
            joint.top_ids[own, : part.k], joint.top_logprobs[own, : part.k] = scores.top_ids, scores.top_logprobs
        first += count
    return joint
