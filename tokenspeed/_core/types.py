"""What the control plane answers with, besides plans: refusals, counters, misuse."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from tokenspeed.errors import TokenSpeedError


class Refusal(enum.IntEnum):
    """Why a submission was not queued. Values are shared with csrc/."""

    QUEUE_FULL = 1
    """As many requests wait as may."""
    TOO_LONG = 2
    """The prompt leaves no room for a token in the model's context."""
    TOO_LONG_FOR_CACHE = 3
    """The prompt fits the context but not the KV cache."""
    EMPTY = 4
    """The prompt has no token."""
    DUPLICATE_ID = 5
    """A request with this id has not ended yet."""
    BAD_TOKEN = 6
    """A token of the prompt, or a stop id, is negative."""


class Misuse(TokenSpeedError, ValueError):
    """A call that makes no sense: a step never launched, an unknown id, an array of the wrong shape.

    The call had no effect; the scheduler goes on as before.
    """


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of the control plane. The first six are the present state, the others grow for ever.

    `running` requests are prefilling or decoding; `draining` ones have left but a launched step may still
    touch their memory; `blocks_used` have a holder, `blocks_cached` are evictable prefix cache.
    `prompt_tokens` are those of admitted requests, `cached_prompt_tokens` of these were prefix hits.
    """

    running: int
    waiting: int
    draining: int
    blocks_free: int
    blocks_cached: int
    blocks_used: int
    preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
