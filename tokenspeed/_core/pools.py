"""One control plane over several KV pools: a scheduler for each group of ranks that attends to requests of its own.

A request lives in one pool, from `submit` to its end. A step has the plans of all pools beside each other, and ends
for all of them at once. Like a scheduler it is deterministic: every rank that makes the same calls routes alike.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from tokenspeed._core.scheduler import PromptHashes, Scheduler
from tokenspeed._core.types import Misuse, Refusal, Stats
from tokenspeed.batch import (
    NOT_FINITE,
    OUTPUT_RECORD,
    BatchLimits,
    CacheEvents,
    Finish,
    Int32Array,
    JointBuffers,
    JointPlan,
    Outputs,
    PlanBuffers,
)

STREAM_TOKENS = 512
"""Work that a stream counts as when requests are routed: what agents generate in a turn, and no more is known of it."""

SESSION_TOKENS = 4 * STREAM_TOKENS
"""Work that a request would rather wait for than leave the pool that knows its session. More, and an application that
gives all of its requests one name would have one pool."""

MOST_IN_FLIGHT = 2
"""Steps, as of a scheduler."""

ELSEWHERE = frozenset({Refusal.TOO_LONG_FOR_CACHE})
"""Refusals by one pool besides those that `can_retry` which need not be another's."""


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step in flight: its number, of each pool the number of its own step, of its samples and of its tokens (None: it
    had nothing to do), and all samples."""

    step: int
    parts: tuple[tuple[int, int, int] | None, ...]
    num_samples: int


class Pools:
    """As a `Scheduler`, of `num_blocks` in each pool; the other sizes are those of each pool by itself, `max_queued`
    aside, which they share.

    **Routing.** A request goes where there will be the least to compute: the prompt tokens that wait there, those of
    its own that are not cached there, and `STREAM_TOKENS` for every request there, less `SESSION_TOKENS` where its
    session is, if that has a name. So a conversation stays where it is cached, as long as that is worth
    more than another pool's idleness, and what many conversations begin with does not draw all of them into one pool.
    Equal ones are decided by who holds fewer blocks, then by number. A pool that refuses for want of room is not the
    last that is asked.

    **Floors** are steered for in each pool by itself, and never promised.

    **Step times** depend on the pool that computes most, so that one alone learns from them.
    """

    def __init__(
        self,
        *,
        num_blocks: Sequence[int],
        limits: BatchLimits,
        max_queued: int,
        prefix_caching: bool,
        hash_key: bytes,
        **sizes: Any,
    ) -> None:
        self._pools = [
            Scheduler(
                num_blocks=blocks,
                limits=limits,
                max_queued=-(-max_queued // len(num_blocks)),
                prefix_caching=prefix_caching,
                hash_key=hash_key,
                **sizes,
            )
            for blocks in num_blocks
        ]
        self._limits, self._hash_key, self._caching = limits, hash_key, prefix_caching
        self._pool_of: dict[int, int] = {}
        self._ended: list[int] = []  # requests whose memory a launched step may still touch
        self._owed = _Owed(len(num_blocks))
        self._copies: set[int] = set()
        self._steps = 0
        self._in_flight: deque[_Launched] = deque()
        self._retry_after = 0.0

    # Calls that change the state

    def submit(self, request_id: int, prompt: Int32Array, **terms: Any) -> Refusal | None:
        """As `Scheduler.submit`, into the pool that suits it best among those that do not refuse it. The refusal is
        that of the best, or of the best of those that may take it later."""
        held = self._pool_of.get(request_id)
        if held is not None and self._pools[held].holds(request_id):
            return self._pools[held].submit(request_id, prompt, **terms)  # which refuses it
        if terms.get("tps_floor"):
            return Refusal.NO_PROMISES
        refusals: list[tuple[Refusal, float]] = []
        for pool, uncached in self._by_work(prompt, terms):
            refusal = self._pools[pool].submit(request_id, prompt, **terms)
            if refusal is None:
                self._pool_of[request_id] = pool
                self._owed.add(request_id, pool, uncached)
                return None
            refusals.append((refusal, self._pools[pool].retry_after))
            if not refusal.can_retry and refusal not in ELSEWHERE:
                break
        passing = [each for each in refusals if each[0].can_retry]
        self._retry_after = min((wait for _, wait in passing), default=0.0)
        return (passing or refusals)[0][0]

    def abort(self, request_id: int) -> bool:
        pool = self._pool_of.get(request_id)
        ended = pool is not None and self._pools[pool].abort(request_id)
        if ended:
            self._end(request_id)
        return ended

    def finish(self, request_id: int, num_tokens: int) -> bool:
        pool = self._pool_of.get(request_id)
        ended = pool is not None and self._pools[pool].finish(request_id, num_tokens)
        if ended:
            self._end(request_id)
        return ended

    def plan(self, now: float, buffers: PlanBuffers) -> JointPlan | None:
        """As `Scheduler.plan`, into `JointBuffers`. None: no pool can do anything now."""
        wanted = [self._limits] * len(self._pools)
        if not isinstance(buffers, JointBuffers) or [part.limits for part in buffers.parts] != wanted:
            raise Misuse(f"the plans of {len(self._pools)} pools need joint buffers of as many parts, of their limits")
        if len(self._in_flight) == MOST_IN_FLIGHT:
            raise Misuse("two steps are in flight; commit the older one first")
        plans = [pool.plan(now, part) for pool, part in zip(self._pools, buffers.parts, strict=True)]
        if all(plan is None for plan in plans):
            return None
        self._steps += 1
        plan = JointPlan.of(self._steps, plans, buffers)
        self._copies.update(plan.copies[:, 0].tolist())
        parts = tuple(None if part is None else (part.step, part.num_samples, part.num_tokens) for part in plans)
        self._in_flight.append(_Launched(plan.step, parts, plan.num_samples))
        return plan

    def commit(self, step: int, tokens: Int32Array, num_tokens: Int32Array, seconds: float = 0.0) -> Outputs:
        """As `Scheduler.commit`, with the samples of all pools in the order of the step's plan."""
        if not self._in_flight or step != self._in_flight[0].step:
            raise Misuse(f"step {step}: not the oldest step in flight")
        launched = self._in_flight[0]
        if not len(tokens) == len(num_tokens) == launched.num_samples:
            raise Misuse(f"step {step}: tokens and num_tokens need one row for each sample row of the step")
        failed = (tokens == NOT_FINITE).all(-1) & ((num_tokens == 0) | (num_tokens == 1))
        if not (failed | ((tokens >= 0).all(-1) & (num_tokens == 1))).all():
            raise Misuse(f"step {step}: a sample row gives one token id, or NOT_FINITE")
        most = max(part[2] for part in launched.parts if part is not None)
        records, firsts, first = [], [], 0
        for pool, part in zip(self._pools, launched.parts, strict=True):
            if part is None:
                continue
            number, samples, computed = part
            own = slice(first, first + samples)
            took = seconds if computed == most else 0.0
            records.append(pool.commit(number, tokens[own], num_tokens[own], took).records)
            firsts.append(first)
            first += samples
        self._in_flight.popleft()
        joint = _joined(records, firsts)
        if self._owed:
            for request_id in joint["request_id"].tolist():
                self._owed.paid(request_id)
        for request_id in joint["request_id"][joint["finish"] != Finish.NONE].tolist():
            self._end(request_id)
        self._ended = [request_id for request_id in self._ended if not self._has_left(request_id)]
        return Outputs(joint.tobytes())

    def land_copies(self, landed: Int32Array, failed: Int32Array) -> None:
        """As `Scheduler.land_copies`, with the tickets of joint plans."""
        tickets = [*landed.tolist(), *failed.tolist()]
        if len(set(tickets)) != len(tickets) or not self._copies.issuperset(tickets):
            raise Misuse("a ticket that is not under way, or is named twice")
        count = len(self._pools)
        for number, pool in enumerate(self._pools):
            pool.land_copies(*(each[each % count == number] // count for each in (landed, failed)))
        self._copies.difference_update(tickets)

    def drop_cached(self) -> int:
        return sum(pool.drop_cached() for pool in self._pools)

    def open_cache_log(self) -> None:
        """As `Scheduler.open_cache_log`, of every pool."""
        for pool in self._pools:
            pool.open_cache_log()

    def take_cache_events(self) -> list[CacheEvents]:
        """As `Scheduler.take_cache_events`, of each pool that has some, by its number."""
        return [
            msgspec.structs.replace(events, pool=number)
            for number, pool in enumerate(self._pools)
            for events in pool.take_cache_events()
        ]

    # Calls that look in

    @property
    def retry_after(self) -> float:
        return self._retry_after

    def pool_of(self, request_id: int) -> int:
        """The number of the pool in which a request lives. Raises `Misuse` if none holds it."""
        pool = self._pool_of.get(request_id)
        if pool is None:
            raise Misuse(f"request {request_id} is unknown or has ended")
        return pool

    def tokens_of(self, request_id: int) -> tuple[Int32Array, int]:
        return self._pools[self.pool_of(request_id)].tokens_of(request_id)

    def cached_tokens(self, request_id: int) -> int:
        for pool in self._pools:
            with contextlib.suppress(Misuse):
                return pool.cached_tokens(request_id)
        raise Misuse(f"request {request_id} is unknown, or ended before the last commit")

    def holds(self, request_id: int) -> bool:
        pool = self._pool_of.get(request_id)
        return pool is not None and self._pools[pool].holds(request_id)

    def stats(self) -> Stats:
        """The sums over the pools, with those of each in `pools`."""
        pools = tuple(pool.stats() for pool in self._pools)
        names = (field.name for field in fields(Stats) if field.name != "pools")
        return Stats(**{name: sum(getattr(pool, name) for pool in pools) for name in names}, pools=pools)

    def check(self) -> str | None:
        for number, pool in enumerate(self._pools):
            if (violation := pool.check()) is not None:
                return f"pool {number}: {violation}"
        unfinished = sum(pool.num_unfinished for pool in self._pools)
        known = sum(self.holds(request_id) for request_id in self._pool_of)
        if unfinished != known:
            return f"{unfinished} requests are in the pools, {known} are known to be"
        return self._owed.check(self._pool_of)

    def dump(self) -> dict[str, object]:
        """The state of each pool; `requests` are those of all."""
        pools = [pool.dump() for pool in self._pools]
        requests = [request for pool in pools for request in _requests(pool)]
        return {
            "last_planned": self._steps,
            "in_flight": len(self._in_flight),
            "owed": list(self._owed.tokens),
            "pools": [{name: value for name, value in pool.items() if name != "requests"} for pool in pools],
            "requests": requests,
        }

    @property
    def num_unfinished(self) -> int:
        return sum(pool.num_unfinished for pool in self._pools)

    @property
    def has_work(self) -> bool:
        return any(pool.has_work for pool in self._pools)

    @property
    def max_length(self) -> int:
        """As of a scheduler, in whichever pool."""
        return min(pool.max_length for pool in self._pools)

    # Routing

    def _by_work(self, prompt: Int32Array, terms: dict[str, Any]) -> list[tuple[int, int]]:
        """The pools in the order in which they are asked, each with the prompt tokens that it would have to compute."""
        known = prompt if self._caching and terms.get("reuse_prefix", True) else prompt[:0]
        hashes = PromptHashes(self._hash_key, terms.get("salt", b""), known, self._limits.block_size)
        ranked = []
        for number, pool in enumerate(self._pools):
            in_session, cached = pool.familiarity(hashes, terms.get("session", 0))
            now = pool.stats()
            uncached = len(prompt) - cached
            work = self._owed.tokens[number] + uncached + STREAM_TOKENS * (now.running + now.waiting)
            ranked.append((work - (SESSION_TOKENS if in_session else 0), now.blocks_used, number, uncached))
        return [(number, uncached) for _, _, number, uncached in sorted(ranked)]

    def _end(self, request_id: int) -> None:
        self._owed.paid(request_id)
        if not self._has_left(request_id):
            self._ended.append(request_id)

    def _has_left(self, request_id: int) -> bool:
        """Whether a request that has ended is held no more; it is then forgotten."""
        if self.holds(request_id):
            return False
        self._pool_of.pop(request_id, None)
        return True


ControlPlane = Scheduler | Pools
"""What an engine plans with: one pool is a scheduler by itself."""


def control_plane(*, num_blocks: Sequence[int], **sizes: Any) -> ControlPlane:
    """A control plane with a pool for each of `num_blocks`; the sizes are those of `Scheduler`."""
    if len(num_blocks) == 1:
        return Scheduler(num_blocks=num_blocks[0], **sizes)
    return Pools(num_blocks=num_blocks, **sizes)


class _Owed:
    """Prompt tokens that each pool has yet to compute, of requests that have had no token so far."""

    def __init__(self, num_pools: int) -> None:
        self.tokens = [0] * num_pools
        self._of: dict[int, tuple[int, int]] = {}

    def add(self, request_id: int, pool: int, tokens: int) -> None:
        self._of[request_id] = (pool, tokens)
        self.tokens[pool] += tokens

    def __bool__(self) -> bool:
        return bool(self._of)

    def paid(self, request_id: int) -> None:
        """The request has had its first token, or has ended; whichever comes first counts."""
        pool, tokens = self._of.pop(request_id, (0, 0))
        self.tokens[pool] -= tokens

    def check(self, pool_of: dict[int, int]) -> str | None:
        sums = [0] * len(self.tokens)
        for request_id, (pool, tokens) in self._of.items():
            if pool_of.get(request_id) != pool:
                return f"request {request_id} counts as work of pool {pool}, in which it is not"
            sums[pool] += tokens
        return None if sums == self.tokens else f"pools owe {sums} prompt tokens, but count {self.tokens}"


def _joined(records: Sequence[bytes], firsts: Sequence[int]) -> npt.NDArray[np.void]:
    """The records of several pools, whose samples stand behind so many others each."""
    joint: npt.NDArray[np.void] = np.frombuffer(bytearray(b"".join(records)), OUTPUT_RECORD)
    sample_index = joint["sample_index"]
    counts = [len(each) // OUTPUT_RECORD.itemsize for each in records]
    sample_index += np.repeat(np.array(firsts, dtype=np.int32), counts) * (sample_index >= 0)
    return joint


def _requests(dump: dict[str, object]) -> Iterator[object]:
    requests = dump["requests"]
    assert isinstance(requests, list)
    yield from requests
