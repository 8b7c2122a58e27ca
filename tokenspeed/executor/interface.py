"""What the step loop knows of the device plane: it launches a plan and later awaits its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

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
    """The ranks that compute each step together, this one as number `rank`. All launch the same plans.

    Rank 0 decides the tokens. The others bind no masks, sample nothing and get its tokens.
    """

    @property
    def rank(self) -> int: ...

    def share(self, tensor: torch.Tensor) -> None:
        """On the device, in place: every rank gets what rank 0 has. Raises where a rank is gone."""
        ...


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
