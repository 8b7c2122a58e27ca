"""What the step loop knows of the device plane: it launches a plan and later awaits its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch

from tokenspeed.batch import Int32Array, Plan, PlanBuffers, StepResult
from tokenspeed.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Binding:
    """A request that takes a device slot: travels with the step whose `plan.bound` names it by index.

    `tokens` are all tokens known when it is bound: the prompt, and after a preemption what it had
    generated; the first `prompt_len` are the prompt. `seed` is resolved by the engine. `stop_ids` are
    masked until `params.min_tokens` tokens are generated. Each of its samples waits for a mask if it is `masked`.
    """

    params: SamplingParams
    tokens: Int32Array
    prompt_len: int
    seed: int
    stop_ids: Int32Array
    masked: bool = False


Mask = Int32Array | None
"""Tokens that may be sampled, [V / 32] with a bit for each, the lowest first; None allows all. It must not change
before its step has landed."""


class Flight(Protocol):
    """One launched step. `masked` are the slots of its samples that wait for a mask: none in most steps."""

    masked: Sequence[int]

    def mask(self, masks: Sequence[Mask]) -> None:
        """Give the masks of `masked`, in its order: once, before any later step is launched. Returns at once."""
        ...

    async def tokens(self) -> StepResult:
        """Wait off the event loop until the step has landed. Raises what the step raised."""
        ...


class Peers(Protocol):
    """The ranks that compute each step together. All launch the same plans.

    Ranks that attend together are a group: this one is in group `group` of `num_groups`, each of which has rows and a
    KV pool of its own. The first rank of a group `decides` its tokens; the others of it bind no masks, sample nothing
    and get these.
    """

    @property
    def num_groups(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def decides(self) -> bool: ...

    def share(self, tokens: torch.Tensor) -> torch.Tensor:
        """On the device: tokens [S] of this rank's group, which get what its first rank decided, in place → those of
        all groups [G, S]. S is the same everywhere. It can be part of a CUDA graph. Raises where a rank is gone."""
        ...

    def told(self, data: bytes) -> list[bytes]:
        """On the host: what the first rank of each group has to tell rank 0, where it comes out; nothing on the others.
        What the other ranks of a group give is not heard."""
        ...


@dataclass(frozen=True, slots=True)
class Beside:
    """What a rank knows of a step of all groups besides its own rows: whatever they have to agree on.

    `tokens` and `rows` are the largest numbers of any group. `samples` and `num_rows` has each group in turn. `decode`:
    every row of all has one token. `whole`: some row's prompt is scored, so that nobody's step is a graph. `tells`:
    log-probabilities were asked for, which rank 0 has to be told.
    """

    tokens: int
    rows: int
    num_rows: tuple[int, ...]
    samples: tuple[int, ...]
    decode: bool
    whole: bool = False
    tells: bool = False

    @classmethod
    def alone(cls, plan: Plan) -> Self:
        """Of a plan beside which there is no other."""
        rows, decode = plan.num_rows, 0 < plan.num_rows == plan.num_decode
        return cls(plan.num_tokens, rows, (rows,), (plan.num_samples,), decode)


class Executor(Protocol):
    """The device plane. Steps run in the order of their launch.

    A step that raises leaves the device in an unknown state: every later flight raises the same error.
    """

    @property
    def num_blocks(self) -> int:
        """KV blocks in the cache."""
        ...

    def launch(self, plan: Plan, bindings: Sequence[Binding]) -> Flight:
        """Enqueue one step and return at once. The plan's buffers are the device's until the flight lands."""
        ...

    def new_buffers(self) -> PlanBuffers:
        """Host memory for one plan, of the kind that this device copies fastest."""
        ...

    def close(self) -> None:
        """Finish the launched steps and give the device back. Idempotent."""
        ...
