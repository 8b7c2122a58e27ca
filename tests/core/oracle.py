"""A scheduler in plain Python with the semantics of the compiled one: short, slow, and written apart from it.

Blocks are objects, prefixes are compared token by token instead of by hash, and everything is looked for instead
of kept at hand. Slots, block numbers and tickets do not exist here: they are the compiled scheduler's own choice.
The step-time model is not written a second time either: what it predicts is observed, and judged by the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from tests.core.oracle_cache import Block, Cache, Copy, Key, Place
from tests.core.oracle_requests import Output, Request, Row, Step
from tests.core.oracle_sessions import IDLE_SECONDS, Sessions
from tokenspeed._core import Policy, Refusal
from tokenspeed.batch import NOT_FINITE, ON_DEVICE, BatchLimits, Finish

PATIENCE = 8
TENURE = 16
STALE = 60.0
LONGEST_RETRY = 600.0
MOST_LESSONS = 8

Predict = Callable[[Sequence[int], Sequence[tuple[int, int]]], float | None]
"""Seconds of a step with these decoding rows and chunks, or None: `Scheduler.predict_seconds`."""


class Oracle:
    def __init__(
        self,
        *,
        num_blocks: int,
        limits: BatchLimits,
        max_model_len: int,
        max_queued: int,
        prefix_caching: bool,
        num_host_blocks: int,
        policy: Policy,
        predict: Predict,
        seconds_of_prompt: Callable[[int], float],
    ) -> None:
        self.limits = limits
        self.size = limits.block_size
        self.max_model_len = max_model_len
        self.max_length = min(max_model_len, num_blocks * self.size, limits.max_blocks * self.size)
        self.max_queued = max_queued
        self.prefix_caching = prefix_caching
        self.policy = policy
        self.predict = predict
        self.seconds_of_prompt = seconds_of_prompt
        self.cache = Cache(num_blocks, num_host_blocks)
        places = num_blocks + num_host_blocks
        self.sessions = Sessions(places - places // 10)
        self.requests: dict[int, Request] = {}
        self.running: list[Request] = []  # fetching, prefilling, decoding, in the order of admission
        self.in_flight: list[Step] = []
        self.launched = self.landed = self.arrivals = 0
        self.slots = limits.max_rows
        self.released: list[int | None] = []
        self.now = -math.inf
        self.departures: list[float] = []
        self.settlements: list[float] = []
        self.next_turnover = self.last_launch = -math.inf
        self.retry_after = 0.0
        self.blocked: tuple[int, int, int, int] | None = None
        """A head that did not fit: its arrival, and gains, blocks of its prefix here and running requests then."""
        self.lessons = 0  # steps without prompts so that the step-time model learns what streams take alone
        self.wanted_free = 0  # blocks that this head would have free
        self.preemptions = self.prompt_tokens = self.cached_prompt_tokens = self.generated = 0
        self.offloaded = self.loaded = self.lost = self.withdrawn = self.gaps = self.passed = self.overdue = 0

    # --- requests come and go ---

    def submit(
        self,
        request_id: int,
        prompt: list[int],
        *,
        now: float,
        max_tokens: int | None,
        min_tokens: int,
        stop_ids: list[int],
        salt: bytes,
        priority: int,
        reuse_prefix: bool,
        session: int,
        tps_floor: float | None,
    ) -> Refusal | None:
        no = (
            (request_id in self.requests, Refusal.DUPLICATE_ID),
            (not prompt, Refusal.EMPTY),
            (len(prompt) >= self.max_model_len, Refusal.TOO_LONG),
            (len(prompt) + 1 > self.max_length, Refusal.TOO_LONG_FOR_CACHE),
            (min(prompt + stop_ids, default=0) < 0, Refusal.BAD_TOKEN),
        )
        for applies, refusal in no:
            if applies:
                return refusal
        now = max(self.now, now)
        if not self.requests:
            self.departures = [now]
        self.retry_after = min(max(interval(self.departures, now) or 0.0, 1.0), LONGEST_RETRY)
        if len(self.waiting()) >= self.max_queued:
            return Refusal.QUEUE_FULL
        floor = self.policy.tps_floor if tps_floor is None else tps_floor
        promised = floor > 0 and (tps_floor is not None or self.policy.floor_is_promise)
        alive = any(request.state != "draining" for request in self.requests.values())
        fresh = alive or now - self.last_launch < STALE
        if fresh and promised and not self.carries([len(prompt)], floor):
            return Refusal.FLOOR_OUT_OF_REACH
        if fresh and self.breaks_a_promise(floor if promised else 0.0, len(prompt)):
            return Refusal.FLOOR
        length = self.max_length if max_tokens is None else min(self.max_length, len(prompt) + max_tokens)
        request = Request(
            request_id, list(prompt), len(prompt), length, min_tokens, frozenset(stop_ids), salt, priority,
            reuse_prefix, self.arrivals, now, PATIENCE * self.seconds_of_prompt(2048) / 2048, floor, promised, None,
        )  # fmt: skip
        if self.policy.footprints and self.matchable(request):
            full = [self.key(request, i) for i in range(len(prompt) // self.size)]
            wait = self.wait_for_room(now)
            known = self.sessions.find(session, full)
            if wait is not None and wait > self.policy.max_queue_seconds and not (known and known.resident):
                self.retry_after = min(wait, LONGEST_RETRY)
                return Refusal.NO_ROOM
            request.session = self.sessions.arrive(session, full, -(-(len(prompt) + 1) // self.size))
        hits, _ = self.cache.match(self.matchable(request))
        request.uncached = len(prompt) - len(hits) * self.size
        request.rank_by(request.uncached)
        self.requests[request_id] = request
        self.arrivals += 1
        self.settle_sessions(now)
        if request.outside and len(self.outside()) == 1:
            self.settlements = [now]
        return None

    def breaks_a_promise(self, floor: float, known: int) -> bool:
        alive = [request for request in self.requests.values() if request.state != "draining"]
        rows = min(len(alive) + 1, self.limits.max_rows)
        context = (sum(len(request.tokens) for request in alive) + known) * rows // (len(alive) + 1)
        mean = context // rows
        kept = [request.floor for request in alive if request.promised and self.carries([0], request.floor)]
        return not self.carries([mean] * (rows - 1) + [context - mean * (rows - 1)], max([floor, *kept]))

    def carries(self, decode: list[int], floor: float) -> bool:
        seconds = self.predict(decode, [])
        return floor <= 0 or seconds is None or seconds <= 1 / floor

    def wait_for_room(self, now: float) -> float | None:
        """How long a session would wait behind those that wait already; None: nobody waits, or it cannot be said."""
        ahead, pace = len(self.outside()), interval(self.settlements, now)
        return None if not ahead or pace is None else pace * (ahead + 1)

    def abort(self, request_id: int) -> bool:
        request = self.requests.get(request_id)
        if request is None or request.state == "draining":
            return False
        self.end(request)
        return True

    def finish(self, request_id: int, num_tokens: int) -> bool:
        request = self.requests.get(request_id)
        if request is None or request.state == "draining":
            return False
        self.generated -= len(request.tokens) - request.prompt_length - num_tokens
        self.end(request)
        return True

    def end(self, request: Request) -> None:
        now = max(self.now, request.arrived)
        self.departures.append(now)
        if request.session:
            self.sessions.leave(request.session, -(-len(request.tokens) // self.size), now)
            request.session = None
        if request in self.running:
            self.running.remove(request)
        if request.state == "fetching":
            self.stop_fetching(request)
        if request.state == "waiting":
            del self.requests[request.id]
            return
        request.state = "draining"
        self.land(request)

    def land(self, request: Request) -> None:
        """A request that leaves gives back all it holds once its last step has landed."""
        if request.last_step > self.landed:
            return
        while request.blocks:
            self.cache.let_go(request.blocks.pop())
        self.slots += 1
        self.released.append(request.id)
        if request.state == "draining":
            del self.requests[request.id]
        else:
            request.state = "waiting"

    def stop_fetching(self, request: Request) -> None:
        """It waits again. Copies that are under way land for nobody."""
        for _ in range(request.room):
            self.cache.put_free()
        for there in reversed(request.prefix):  # so that the end of a chain is evicted first
            if isinstance(there, Block):
                self.cache.let_go(there)
            elif isinstance(there, Place):
                self.cache.put_back(there)
            elif isinstance(there, Copy):
                there.waiter = None
        request.prefix, request.room, request.state = [], 0, "waiting"
        self.slots += 1
        self.released.append(None)

    def waiting(self) -> list[Request]:
        return [request for request in self.requests.values() if request.state == "waiting"]

    def outside(self) -> list[Request]:
        return [request for request in self.waiting() if request.outside]

    def head(self) -> Request | None:
        ready = [request for request in self.waiting() if not request.outside]
        return min(ready, key=lambda request: request.precedence, default=None)

    def leaving(self) -> list[Request]:
        return [request for request in self.requests.values() if request.state in ("retracting", "draining")]

    def of_state(self, state: str) -> list[Request]:
        return [request for request in self.running if request.state == state]

    # --- blocks ---

    def key(self, request: Request, block: int) -> Key:
        return request.salt, tuple(request.tokens[: (block + 1) * self.size])

    def matchable(self, request: Request) -> list[Key]:
        """At least one known token is always computed."""
        if not (self.prefix_caching and request.reuse_prefix):
            return []
        return [self.key(request, i) for i in range((len(request.tokens) - 1) // self.size)]

    def seal(self, request: Request, landed: int) -> None:
        for i, block in enumerate(request.blocks[: landed // self.size]):
            if self.prefix_caching and not block.full:
                self.cache.seal(block, self.key(request, i))

    # --- a step ---

    def plan(self, now: float, allowed: int | None) -> Step | None:
        """`allowed` prompt tokens is what the compiled scheduler planned with, None: it planned nothing."""
        self.now = now
        step = Step(self.launched + 1, self.limits.max_tokens)
        self.plan_decodes(step)
        step.num_decode = len(step.rows)
        self.settle_sessions(self.now)
        self.plan_starts(step)
        again = True
        while again:
            self.plan_prompts(step, allowed)
            self.plan_loads(step)
            again = self.plan_offloads(step) and step.empty
        if step.empty:
            return None
        step.released, self.released = self.released, []
        self.launched += 1
        self.last_launch = self.now
        self.in_flight.append(step)
        return step

    def plan_decodes(self, step: Step) -> None:
        for request in list(self.running):
            if request not in self.running or request.state != "decoding":
                continue
            if len(request.tokens) + request.pending >= request.max_length:
                continue
            if request.computed == len(request.blocks) * self.size:
                block = self.block_for(request, step)
                if block is None:
                    continue
                step.new_blocks.append((request.id, len(request.blocks)))
                request.blocks.append(block)
            token = ON_DEVICE if request.pending else request.tokens[-1]
            self.add_row(step, request, 1, (token,), samples=True)

    def block_for(self, request: Request, step: Step) -> Block | None:
        block = self.cache.take()
        while block is None and not self.leaving() and not self.cache.coming_back:
            last = max(self.running, key=lambda other: other.order)
            step.preempted = True
            self.preempt(last)
            if last is request:
                return None
            block = self.cache.take()
        return block

    def preempt(self, request: Request) -> None:
        self.preemptions += 1
        self.running.remove(request)
        if request.state == "fetching":
            return self.stop_fetching(request)
        request.state = "retracting"
        return self.land(request)

    def add_row(self, step: Step, request: Request, new: int, token_ids: tuple[int, ...], *, samples: bool) -> None:
        step.rows.append(Row(request, new, request.computed, token_ids, samples))
        step.tokens -= new
        request.computed += new
        request.pending += samples
        request.last_step = step.number

    def settle_sessions(self, now: float) -> None:
        while outside := self.outside():
            first = min(outside, key=lambda request: request.precedence)
            assert first.session is not None
            idle_machine = not self.running and not self.leaving() and self.head() is None
            waited = now - first.arrived
            late = waited >= self.policy.max_queue_seconds and now >= self.next_turnover
            overdue = late and not self.sessions.fits(first.session)
            if overdue:
                self.overdue += 1
                self.next_turnover = now + TENURE * self.seconds_of_prompt(len(first.tokens))
            if not self.sessions.settle(first.session, now, urgent=idle_machine or overdue, overdue=overdue):
                fits = [request for request in outside if request.session and self.sessions.fits(request.session)]
                if not fits or waited >= IDLE_SECONDS:
                    return
                passes = min(fits, key=lambda request: request.precedence)
                assert passes.session is not None
                passes.session.resident = True
                self.passed += 1
            self.settlements.append(now)

    # --- prompts ---

    def plan_prompts(self, step: Step, observed: int | None) -> None:
        queue = sorted(self.of_state("prefilling"), key=lambda request: request.precedence)
        admitting = not step.preempted or not self.running
        if not queue and not (admitting and self.head()):
            assert not observed, "prompt tokens are allowed and there is no prompt"
            return
        step.tokens = self.allowed(step, observed)
        while step.tokens > 0:
            head = self.head() if admitting else None
            if head and (not queue or head.precedence < queue[0].precedence):
                admitting = self.admit(head, step)
                if admitting and head.state == "prefilling":
                    self.compute_prompt(head, step)
            elif queue:
                self.compute_prompt(queue.pop(0), step)
            else:
                return

    def allowed(self, step: Step, observed: int | None) -> int:
        """How many prompt tokens the floors leave is learned, and so observed; that they are none of it is a rule."""
        decode = step.rows[: step.num_decode]
        floors = [row.request.floor for row in decode if self.carries([row.computed], row.request.floor)]
        if max(floors, default=0.0) <= 0:
            assert observed in (None, step.tokens), "a prompt is held back for a floor that nobody has or can have"
            return step.tokens
        if self.predict([], []) is None and not observed:
            self.lessons += 1
            assert self.lessons <= MOST_LESSONS, "prompts wait for a model that does not learn"
        assert observed is not None and 0 <= observed <= step.tokens, "more tokens than there are"
        return observed

    def compute_prompt(self, request: Request, step: Step) -> None:
        new = min(step.tokens, len(request.tokens) - request.computed)
        chunk = tuple(request.tokens[request.computed : request.computed + new])
        samples = request.computed + new == len(request.tokens)
        self.add_row(step, request, new, chunk, samples=samples)
        if samples:
            request.state = "decoding"
        else:
            request.rank_by(len(request.tokens) - request.computed)

    def admit(self, request: Request, step: Step) -> bool:
        if self.slots == 0:
            return False
        prefix = self.find_room(request, step)
        if prefix is None:
            return False
        self.running.append(request)
        self.slots -= 1
        size = self.table_size(request)
        hits = [self.cache.hit(there) if isinstance(there, Block) else self.cache.hold(there) for there in prefix]
        blocks = [hit for hit in hits if isinstance(hit, Block)]
        if len(blocks) < len(hits):
            request.state, request.prefix, request.room = "fetching", list(hits), size - len(blocks)
            for _ in range(request.room):
                self.cache.take_free()
            return True
        while len(blocks) < size:
            block = self.cache.take()
            assert block is not None
            blocks.append(block)
        self.bind(request, blocks, len(hits), step)
        return True

    def table_size(self, request: Request) -> int:
        return -(-len(request.tokens) // self.size)

    def find_room(self, request: Request, step: Step) -> list[Block | Place] | None:
        """The prefix that is in the cache, if there is room for the rest."""
        cache, size = self.cache, self.table_size(request)
        running = len(self.running)
        looked = self.blocked is not None and self.blocked[:2] == (request.arrival, cache.gains)
        prefix, in_transit = cache.match(self.matchable(request))
        here = [there for there in prefix if isinstance(there, Block)]
        wanted = -(-(len(request.tokens) + 1) // self.size) - len(here) + running
        suffices = wanted <= cache.free + len(cache.cached) - sum(block.holders == 0 for block in here)
        must_move = suffices and cache.num_places > 0 and wanted > cache.free
        room = suffices and not must_move and not in_transit
        fits = len(step.new_blocks) + size <= self.limits.max_deltas
        if looked and self.blocked is not None and self.blocked[3] <= running:
            longer = len(here) > self.blocked[2]  # others have sealed what it wants to compute, too: no reason to look
            assert longer or not (room and fits), "a request waits for blocks that are there"
            return None
        if not fits:
            return None
        self.wanted_free = wanted if must_move else 0
        if must_move:  # its own prefix goes to the host last of all
            for there in reversed(prefix):
                if isinstance(there, Block):
                    cache.let_go(cache.hit(there))
                else:
                    cache.put_back(cache.hold(there))
        if room:
            return prefix
        self.blocked = (request.arrival, cache.gains, len(here), running)
        return None

    def bind(self, request: Request, blocks: list[Block], hits: int, step: Step) -> None:
        request.blocks = blocks
        request.state = "prefilling"
        request.computed = hits * self.size
        request.pending = request.last_step = 0
        request.untouched = hits if request.untouched is None else min(request.untouched, hits)
        if request.cached is None:
            request.cached = request.computed
            self.prompt_tokens += request.prompt_length
            self.cached_prompt_tokens += request.cached
        request.rank_by(len(request.tokens) - request.computed)
        step.bound.append(request.id)
        step.new_blocks += [(request.id, i) for i in range(len(blocks))]

    # --- the second tier ---

    def plan_starts(self, step: Step) -> None:
        for request in self.of_state("fetching"):
            size = self.table_size(request)
            if any(isinstance(there, (Place, Copy)) for there in request.prefix):
                continue
            if len(step.new_blocks) + size > self.limits.max_deltas:
                continue
            here = [there for there in request.prefix if isinstance(there, Block) and there.key is not None]
            if len(here) < len(request.prefix):
                self.gaps += 1
                self.running.remove(request)
                self.stop_fetching(request)
                continue
            for _ in range(request.room - (size - len(here))):
                self.cache.put_free()
            room = [Block() for _ in range(size - len(here))]
            request.prefix, request.room = [], 0
            self.bind(request, here + room, len(here), step)

    def plan_loads(self, step: Step) -> None:
        for request in self.of_state("fetching"):
            for position, there in enumerate(request.prefix):
                if not isinstance(there, Place):
                    continue
                known = self.cache.index.get(there.key) if there.key is not None else None
                if there.key is None:
                    self.withdrawn += 1
                    request.prefix[position] = None
                elif known is not None and not known.copying:  # computed again meanwhile, by another request
                    request.prefix[position] = self.cache.hit(known)
                elif known is not None or len(step.copies) == self.limits.max_copies:
                    break
                else:
                    request.room -= 1
                    copy = self.cache.begin_load(there, Block(), request.id, position)
                    request.prefix[position] = copy
                    step.copies.append(copy)
                    self.loaded += 1
                    continue
                self.cache.put_back(there)

    def plan_offloads(self, step: Step) -> bool:
        """True: some blocks are free at once, because the host has their content already."""
        cache = self.cache
        if cache.num_places == 0:
            return False
        freed = False
        wanted = max(self.wanted_free if self.head() else 0, len(self.running))
        while len(step.copies) < self.limits.max_copies and cache.free + cache.offloads < wanted and cache.cached:
            key = next(iter(cache.cached))
            if key in cache.places:
                del cache.cached[key], cache.index[key]
                cache.put_free()
                freed = True
                continue
            place = cache.take_place()
            if place is None:
                break
            step.copies.append(cache.begin_offload(key, place))
            self.offloaded += 1
        return freed

    def land_copies(self, landed: list[Copy], failed: list[Copy]) -> None:
        for copy in [*landed, *failed]:
            arrived = self.cache.land(copy, failed=copy in failed)
            if copy.to_host:
                continue
            if copy.waiter is None:
                self.cache.let_go(copy.block)
                continue
            request_id, position = copy.waiter
            request = self.requests[request_id]
            request.prefix[position] = copy.block if arrived else None
            request.room += not arrived
            self.lost += not arrived

    # --- a landed step ---

    def commit(self, tokens: list[int]) -> list[Output]:
        step = self.in_flight.pop(0)
        self.landed = step.number
        outputs: list[Output] = []
        sample = -1
        for row in step.rows:
            sample += row.samples
            request = row.request
            if row.new > 1:
                self.blocked = None
            if request.state == "draining":
                self.land(request)
                continue
            token = tokens[sample] if row.samples else None
            finish, stop_id = Finish.NONE, -1
            if token == NOT_FINITE:
                self.withdraw(request)
                finish = Finish.ERROR
            else:
                self.seal(request, row.computed + row.new)
                if token is not None:
                    request.tokens.append(token)
                    request.pending -= 1
                    self.generated += 1
                    finish, stop_id = self.ending(request, token)
            if token is not None:
                outputs.append(Output(request.id, sample, token, int(token >= 0), finish, stop_id))
            if finish is not Finish.NONE:
                self.end(request)
            elif request.state == "retracting":
                self.land(request)
        return outputs

    def withdraw(self, request: Request) -> None:
        """Out of the cache with all that it may have written."""
        assert request.untouched is not None
        for i in range(request.untouched, len(request.tokens) // self.size):
            self.cache.withdraw(self.key(request, i))

    def ending(self, request: Request, token: int) -> tuple[Finish, int]:
        generated = len(request.tokens) - request.prompt_length
        if token in request.stop_ids and generated >= request.min_tokens:
            return Finish.STOP, token
        if len(request.tokens) >= request.max_length:
            return Finish.LENGTH, -1
        return Finish.NONE, -1


def interval(times: list[float], now: float) -> float | None:
    """Seconds from one of the latest 64 times to the next, `now` included."""
    latest = times[-64:]
    return (now - latest[0]) / len(latest) if len(latest) > 1 else None
