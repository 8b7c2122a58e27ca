"""The control plane as the simulator builds and asks it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tokenspeed._core.scheduler import Scheduler
from tokenspeed._core.types import Misuse, Policy
from tokenspeed.batch import BatchLimits, Int32Array
from tokenspeed.errors import ConfigError
from tokenspeed.simulate.step_models import StepModel

NO_STOP_IDS: Int32Array = np.empty(0, dtype=np.int32)
HASH_KEY = bytes(range(16))
STEERED = Policy(tps_floor=70.0)
"""The policy that a server has by default: the floor sizes chunks of prompts and refuses nobody."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """One engine: its step-time model, memory, largest step and policy. A GB is 10^9 bytes."""

    model: StepModel
    kv_tokens: int
    host_gb: float = 0.0
    host_gbps: float = 50.0
    block_size: int = 64
    max_rows: int = 128
    chunk_tokens: int = 8192
    max_queued: int = 4096
    policy: Policy = STEERED

    @property
    def block_bytes(self) -> int:
        """Bytes of a KV block on all layers."""
        return self.block_size * self.model.kv_bytes_per_token

    @property
    def limits(self) -> BatchLimits:
        """The largest step."""
        max_blocks = -(-self.model.max_model_len // self.block_size)
        return BatchLimits(self.max_rows, self.chunk_tokens, max_blocks, self.block_size)


def new_scheduler(sizes: Sizes) -> Scheduler:
    """The compiled control plane in these sizes. Raises `ConfigError` where they cannot be."""
    try:
        return Scheduler(
            num_blocks=sizes.kv_tokens // sizes.block_size,
            limits=sizes.limits,
            max_model_len=sizes.model.max_model_len,
            max_queued=sizes.max_queued,
            prefix_caching=True,
            hash_key=HASH_KEY,
            num_host_blocks=int(sizes.host_gb * 1e9) // sizes.block_bytes,
            policy=sizes.policy,
        )
    except Misuse as error:
        raise ConfigError(f"the control plane refuses these sizes: {error}") from None


def submit(
    core: Scheduler, request_id: int, prompt: Int32Array, *, now: float, output: int, session: int
) -> float | None:
    """Queue a request of exactly `output` tokens. None: it is queued; else seconds after which to try again.

    They are whole and at least one, as a client reads them in `Retry-After`. Raises `ConfigError` for a request
    that can never be served.
    """
    refusal = core.submit(request_id, prompt, now=now, max_tokens=output, stop_ids=NO_STOP_IDS, session=session)
    if refusal is None:
        return None
    if not refusal.can_retry:
        raise ConfigError(f"a prompt of {len(prompt)} tokens is refused: {refusal.name}")
    return max(1.0, math.ceil(core.retry_after))
