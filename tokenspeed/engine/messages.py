"""What the front end and the engine process say to each other: msgspec structs in msgpack frames.

Front end → engine: `Start`, `Learn`, `Submit`, `Abort`, `FinishAt`, `DropCached`, `Shutdown`.
Engine → front end: `Loading`, `Ready`, `Failed`, `Learnt`, `Dropped`, `Accepted`, `Refused`, `Tokens`, `Heartbeat`,
and `CacheEvents` behind what a step has given, if asked for.
An engine inside the caller's process exchanges the same objects without encoding them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import msgspec

from tokenspeed.batch import CacheEvents
from tokenspeed.config import EngineConfig
from tokenspeed.engine.observe import StepHistograms
from tokenspeed.request import TokenLogprob
from tokenspeed.text.grammars.vocabulary import Vocabulary

if TYPE_CHECKING:
    from tokenspeed._core import Stats


class PoolStats(msgspec.Struct, frozen=True, array_like=True):
    """Of one KV pool what `EngineStats` has of all."""

    running: int
    waiting: int
    blocks_total: int
    blocks_used: int
    blocks_cached: int = 0
    waiting_uncached_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0

    @classmethod
    def of(cls, pool: Stats) -> Self:
        """Those of the counters of a pool."""
        return cls(
            pool.running, pool.waiting, pool.blocks_total, pool.blocks_used, pool.blocks_cached,
            pool.waiting_uncached_tokens, pool.prompt_tokens, pool.cached_prompt_tokens, pool.generated_tokens,
        )  # fmt: skip


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of the engine: requests and blocks as they are now, the rest since the start.

    `draining` requests have ended, but a step in flight may still touch their memory; `slowest_abort_seconds`
    and `slowest_abort_steps` are the longest that an aborted one kept it. `sessions_waiting` requests belong to
    sessions that do not fit beside the `sessions_resident`. `refusals` counts by the reason, a `Refusal`'s name
    in lower case. `streams_below_floor` had fewer tokens in the last second than their floor, as of the last heartbeat.
    `blocks_used` have a holder, `blocks_cached` are kept until their memory is wanted. `waiting_uncached_tokens` are
    those of waiting prompts that were not cached when they came. `generation_rate` is in tokens a second, of late.
    `pools` are those of each pool, where groups of ranks have pools of their own.
    """

    running: int = 0
    waiting: int = 0
    draining: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    host_blocks_used: int = 0
    sessions_resident: int = 0
    sessions_waiting: int = 0
    waiting_uncached_tokens: int = 0
    generation_rate: float = 0.0
    streams_below_floor: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0
    refusals: dict[str, int] = {}
    num_aborts: int = 0
    slowest_abort_seconds: float = 0.0
    slowest_abort_steps: int = 0
    pools: list[PoolStats] = []


class Start(msgspec.Struct, tag="start", frozen=True):
    """The first frame: build an engine like this."""

    config: EngineConfig


class Submit(msgspec.Struct, tag="submit", frozen=True, kw_only=True):
    """One choice of one request. `prompt` is little-endian int32; `seed` is already resolved.

    `params` are `SamplingParams` still encoded: they are decoded where a bad one can be refused. Equal `session`s
    > 0 are turns of one conversation, 0 names none. `tps_floor` None is the engine's, 0 none. `grammar` is the key of a
    grammar that the engine was taught, empty for none.
    """

    id: int
    prompt: bytes
    params: msgspec.Raw
    seed: int
    salt: bytes = b""
    priority: int = 0
    session: int = 0
    tps_floor: float | None = None
    grammar: bytes = b""


class Learn(msgspec.Struct, tag="learn", frozen=True):
    """A grammar that requests are about to follow; each is answered by a `Learnt`.

    Without `rules` it only asks whether the engine has it. `vocabulary` goes to an engine that has none yet.
    """

    id: int
    key: bytes
    rules: str = ""
    vocabulary: Vocabulary | None = None


class Abort(msgspec.Struct, tag="abort", frozen=True):
    """Nobody reads this choice any more. Unknown and finished ids are fine."""

    id: int


class FinishAt(msgspec.Struct, tag="finish", frozen=True):
    """A stop string ended this choice after `num_tokens` generated tokens."""

    id: int
    num_tokens: int


class DropCached(msgspec.Struct, tag="drop_cached", frozen=True):
    """Free all KV blocks that are cached and that no request holds; answered by a `Dropped`."""

    id: int


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """End the engine process; whatever still runs is dropped."""


class Loading(msgspec.Struct, tag="loading", frozen=True):
    """Progress of the start: bytes done and in all of one stage."""

    stage: str
    done: int
    total: int


class Ready(msgspec.Struct, tag="ready", frozen=True, kw_only=True):
    """The engine serves. `summary` is one line about memory and backends for the log."""

    max_model_len: int
    num_blocks: int
    block_size: int
    summary: str


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The engine is over. `config` tells a start that cannot work as asked from a failure while serving."""

    error: str
    config: bool


class Lost(msgspec.Struct, frozen=True):
    """This engine is over and another one is being started: `Ready` or `Failed` follows. Said by a link, not sent."""

    error: str


class Learnt(msgspec.Struct, tag="learnt", frozen=True):
    """The answer to the `Learn` of this id: whether the engine holds the grammar now, or why it cannot be compiled.

    `lacks_vocabulary`: it must be told that, too, before it can compile anything. `full`: it has no room for one more
    beside those that requests follow.
    """

    id: int
    held: bool
    error: str = ""
    lacks_vocabulary: bool = False
    full: bool = False


class Dropped(msgspec.Struct, tag="dropped", frozen=True):
    """The answer to the `DropCached` of this id: how many blocks were freed, and how many requests hold."""

    id: int
    num_blocks: int
    num_held: int


class Accepted(msgspec.Struct, tag="accepted", frozen=True):
    """The choice is queued."""

    id: int


class Refused(msgspec.Struct, tag="refused", frozen=True, kw_only=True):
    """The choice was not queued. `reason` is the name of a `Refusal`, or INVALID with a `detail`.

    `param` is the field at fault, if it is known. `retry_after` is in whole seconds.
    """

    id: int
    reason: str
    detail: str = ""
    param: str | None = None
    retry_after: int = 1


class ChoiceTokens(msgspec.Struct, array_like=True, frozen=True):
    """What one choice gained in one step. `finish` is a value of `batch.Finish`, `stop_id` −1 if none.

    `error` may say more about one that ended with an error.
    """

    id: int
    token_ids: list[int]
    finish: int = 0
    stop_id: int = -1
    cached: int = 0
    queue_seconds: float = 0.0
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: str | None = None


class Tokens(msgspec.Struct, tag="tokens", frozen=True):
    """Everything that one step gave, in one frame."""

    choices: list[ChoiceTokens]
    stats: EngineStats


class Heartbeat(msgspec.Struct, tag="heartbeat", frozen=True):
    """The engine's event loop runs. Sent on a timer, also while loading (both None) and in a long step."""

    stats: EngineStats | None
    steps: StepHistograms | None = None


ToEngine = Start | Learn | Submit | Abort | FinishAt | DropCached | Shutdown
FromEngine = Loading | Ready | Failed | Learnt | Dropped | Accepted | Refused | Tokens | Heartbeat | CacheEvents
