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
    """A request with this id has not ended, or has but a launched step may still touch its memory."""
    BAD_TOKEN = 6
    """A token of the prompt, or a stop id, is negative."""
    FLOOR = 7
    """A promised floor of tokens per second could not be kept, the request's own or another's."""
    NO_ROOM = 8
    """The KV cache is full of sessions in use, and the request's own would have to wait too long."""
    FLOOR_OUT_OF_REACH = 9
    """Not even alone could the request keep the floor that it is promised."""
    NO_PROMISES = 10
    """Where there are several pools no floor is promised: a pool does not know the prompts of the others, for which its
    streams wait, too. Only `Pools` say so."""

    @property
    def can_retry(self) -> bool:
        """Whether the same request may succeed later."""
        return self in (Refusal.QUEUE_FULL, Refusal.FLOOR, Refusal.NO_ROOM)


@dataclass(frozen=True, slots=True)
class Policy:
    """How the control plane shares the device.

    `tps_floor`: tokens per second that every stream should keep, 0 = none; it sizes the chunks of prompts. With
    `floor_is_promise` a request that would break a floor is refused; a floor that a request names is always a promise.
    `footprints`: a session counts with all its blocks, also between its turns, and sessions that do not fit
    wait, instead of evicting each other. `max_queue_seconds`: one that is expected to wait longer is refused.
    """

    tps_floor: float = 0.0
    floor_is_promise: bool = False
    footprints: bool = True
    max_queue_seconds: float = 300.0


class Misuse(TokenSpeedError, ValueError):
    """A call that makes no sense: a step never launched, an unknown id, an array of the wrong shape.

    The call had no effect; the scheduler goes on as before.
    """


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of the control plane. The first eleven are the present state, the others grow for ever.

    `running` requests are fetching, prefilling or decoding; `draining` ones have left but a launched step may still
    touch their memory; `blocks_used` have a holder, `blocks_cached` are evictable prefix cache; `host_blocks_used` are
    in the second tier. `sessions_waiting` requests belong to sessions that do not fit beside the `sessions_resident`.
    `waiting_uncached_tokens` are those of waiting prompts that were not cached when they were submitted.
    `prompt_tokens` are those of admitted requests, `cached_prompt_tokens` of these were prefix hits. `pools` are the
    counters of each pool where there are several.
    """

    running: int
    waiting: int
    draining: int
    blocks_free: int
    blocks_cached: int
    blocks_used: int
    host_blocks_used: int
    copies_in_flight: int
    sessions_resident: int
    sessions_waiting: int
    waiting_uncached_tokens: int
    preemptions: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generated_tokens: int
    blocks_offloaded: int
    blocks_loaded: int
    pools: tuple[Stats, ...] = ()

    @property
    def blocks_total(self) -> int:
        """Blocks on the device."""
        return self.blocks_free + self.blocks_cached + self.blocks_used
