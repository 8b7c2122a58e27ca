"""A scheduler in plain Python with the semantics of the compiled one: short, slow, and written apart from it.

Blocks are objects, prefixes are compared token by token instead of by hash, and everything is looked for instead
of kept at hand. Slots and block numbers do not exist here: they are the compiled scheduler's own choice.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from tokenspeed._core import Refusal
from tokenspeed.batch import NOT_FINITE, ON_DEVICE, BatchLimits, Finish

Key = tuple[bytes, tuple[int, ...]]
"""What a full block means: the tenant's salt and all tokens from the first one to the block's last."""


@dataclass(eq=False)
class Block:
    key: Key | None = None  # set while the block is in the index
    holders: int = 1
    full: bool = False


@dataclass(eq=False)
class Request:
    id: int
    tokens: list[int]
    prompt_length: int
    max_length: int
    min_tokens: int
    stop_ids: frozenset[int]
    salt: bytes
    priority: int
    reuse_prefix: bool
    arrival: int
    state: str = "waiting"  # then running, retracting, draining
    decoding: bool = False
    blocks: list[Block] = field(default_factory=list)
    computed: int = 0
    pending: int = 0
    last_step: int = 0
    cached: int | None = None
    untouched: int | None = None  # blocks that were hits in every admission


@dataclass(frozen=True)
class Row:
    request: Request
    new: int
    computed: int
    token_ids: tuple[int, ...]
    samples: bool


@dataclass
class Step:
    number: int
    rows: list[Row] = field(default_factory=list)
    num_decode: int = 0
    bound: list[int] = field(default_factory=list)  # request ids
    released: list[int] = field(default_factory=list)
    new_blocks: list[tuple[int, int]] = field(default_factory=list)  # (request id, position in its table)


@dataclass(frozen=True)
class Output:
    request_id: int
    sample: int
    token: int
    num_tokens: int
    finish: Finish
    stop_id: int


class Oracle:
    def __init__(
        self, *, num_blocks: int, limits: BatchLimits, max_model_len: int, max_queued: int, prefix_caching: bool
    ) -> None:
        self.limits = limits
        self.size = limits.block_size
        self.num_blocks = self.free = num_blocks
        self.max_model_len = max_model_len
        self.max_length = min(max_model_len, num_blocks * self.size, limits.max_blocks * self.size)
        self.max_queued = max_queued
        self.prefix_caching = prefix_caching
        self.index: dict[Key, Block] = {}
        self.cached: OrderedDict[Key, Block] = OrderedDict()  # least recently used first
        self.requests: dict[int, Request] = {}
        self.running: list[Request] = []  # in the order of admission
        self.in_flight: list[Step] = []
        self.launched = self.landed = self.arrivals = 0
        self.slots = limits.max_rows
        self.released: list[int] = []
        self.preemptions = self.prompt_tokens = self.cached_prompt_tokens = self.generated = 0

    # --- requests come and go ---

    def submit(
        self,
        request_id: int,
        prompt: list[int],
        *,
        max_tokens: int | None,
        min_tokens: int,
        stop_ids: list[int],
        salt: bytes,
        priority: int,
        reuse_prefix: bool,
    ) -> Refusal | None:
        no = (
            (request_id in self.requests, Refusal.DUPLICATE_ID),
            (not prompt, Refusal.EMPTY),
            (len(prompt) >= self.max_model_len, Refusal.TOO_LONG),
            (len(prompt) + 1 > self.max_length, Refusal.TOO_LONG_FOR_CACHE),
            (min(prompt + stop_ids, default=0) < 0, Refusal.BAD_TOKEN),
            (len(self.waiting()) >= self.max_queued, Refusal.QUEUE_FULL),
        )
        for applies, refusal in no:
            if applies:
                return refusal
        length = self.max_length if max_tokens is None else min(self.max_length, len(prompt) + max_tokens)
        self.requests[request_id] = Request(
            request_id, list(prompt), len(prompt), length, min_tokens, frozenset(stop_ids), salt, priority,
            reuse_prefix, self.arrivals,
        )  # fmt: skip
        self.arrivals += 1
        return None

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
        if request.state == "waiting":
            del self.requests[request.id]
            return
        if request.state == "running":
            self.running.remove(request)
        request.state = "draining"
        self.land(request)

    def land(self, request: Request) -> None:
        """A request that leaves gives back all it holds once its last step has landed."""
        if request.last_step > self.landed:
            return
        while request.blocks:
            self.let_go(request.blocks.pop())
        self.slots += 1
        self.released.append(request.id)
        if request.state == "draining":
            del self.requests[request.id]
        else:
            request.state = "waiting"

    def waiting(self) -> list[Request]:
        waiting = [request for request in self.requests.values() if request.state == "waiting"]
        return sorted(waiting, key=lambda request: (request.priority, request.arrival))

    def leaving(self) -> list[Request]:
        return [request for request in self.requests.values() if request.state in ("retracting", "draining")]

    # --- blocks ---

    def let_go(self, block: Block) -> None:
        block.holders -= 1
        if block.holders == 0:
            if block.key is not None:
                self.cached[block.key] = block
            else:
                self.free += 1

    def take(self) -> Block | None:
        if self.free > 0:
            self.free -= 1
            return Block()
        if self.cached:
            key, _ = self.cached.popitem(last=False)
            del self.index[key]
            return Block()
        return None

    def key(self, request: Request, block: int) -> Key:
        return request.salt, tuple(request.tokens[: (block + 1) * self.size])

    def hits(self, request: Request) -> list[Block]:
        found: list[Block] = []
        if self.prefix_caching and request.reuse_prefix:
            while len(found) < (len(request.tokens) - 1) // self.size:
                block = self.index.get(self.key(request, len(found)))
                if block is None:
                    break
                found.append(block)
        return found

    def seal(self, request: Request, landed: int) -> None:
        for i, block in enumerate(request.blocks[: landed // self.size]):
            if self.prefix_caching and not block.full:
                block.full = True
                key = self.key(request, i)
                if key not in self.index:
                    block.key = key
                    self.index[key] = block

    def withdraw(self, request: Request) -> None:
        assert request.untouched is not None
        for i in range(request.untouched, len(request.tokens) // self.size):
            block = self.index.pop(self.key(request, i), None)
            if block is None:
                continue
            if block.holders == 0:
                assert block.key is not None
                del self.cached[block.key]
                self.free += 1
            block.key = None

    # --- a step ---

    def plan(self) -> Step | None:
        step = Step(self.launched + 1)
        preempted = self.plan_decodes(step)
        step.num_decode = len(step.rows)
        for request in self.running:
            if not request.decoding:
                self.plan_prefill(step, request)
        if not preempted:
            self.admit(step)
        if not step.rows:
            return None
        step.released, self.released = self.released, []
        self.launched += 1
        self.in_flight.append(step)
        return step

    def plan_decodes(self, step: Step) -> bool:
        preempted = False
        for request in list(self.running):
            if request not in self.running or not request.decoding:
                continue
            if len(request.tokens) + request.pending >= request.max_length:
                continue
            if request.computed == len(request.blocks) * self.size:
                block = self.take()
                while block is None and not self.leaving():
                    youngest = self.running[-1]
                    self.preempt(youngest)
                    preempted = True
                    if youngest is request:
                        break
                    block = self.take()
                if block is None:
                    continue
                step.new_blocks.append((request.id, len(request.blocks)))
                request.blocks.append(block)
            token = ON_DEVICE if request.pending else request.tokens[-1]
            self.add_row(step, request, 1, (token,), samples=True)
        return preempted

    def preempt(self, request: Request) -> None:
        self.preemptions += 1
        self.running.remove(request)
        request.state = "retracting"
        self.land(request)

    def tokens_left(self, step: Step) -> int:
        return self.limits.max_tokens - sum(row.new for row in step.rows)

    def plan_prefill(self, step: Step, request: Request) -> None:
        new = min(self.tokens_left(step), len(request.tokens) - request.computed)
        if new > 0:
            chunk = tuple(request.tokens[request.computed : request.computed + new])
            samples = request.computed + new == len(request.tokens)
            self.add_row(step, request, new, chunk, samples=samples)
            request.decoding = samples

    def add_row(self, step: Step, request: Request, new: int, token_ids: tuple[int, ...], *, samples: bool) -> None:
        step.rows.append(Row(request, new, request.computed, token_ids, samples))
        request.computed += new
        request.pending += samples
        request.last_step = step.number

    def admit(self, step: Step) -> None:
        for request in self.waiting():
            known = len(request.tokens)
            blocks = -(-known // self.size)
            if self.slots == 0 or self.tokens_left(step) == 0:
                return
            if len(step.new_blocks) + blocks > self.limits.max_deltas:
                return
            hits = self.hits(request)
            available = self.free + len(self.cached) - sum(block.holders == 0 for block in hits)
            if -(-(known + 1) // self.size) - len(hits) + len(self.running) > available:
                return
            for block in hits:
                if block.holders == 0:
                    assert block.key is not None
                    del self.cached[block.key]
                block.holders += 1
            request.blocks = list(hits)
            while len(request.blocks) < blocks:
                block_or_none = self.take()
                assert block_or_none is not None
                request.blocks.append(block_or_none)
            self.slots -= 1
            request.state = "running"
            request.decoding = False
            request.computed = len(hits) * self.size
            request.pending = request.last_step = 0
            request.untouched = len(hits) if request.untouched is None else min(request.untouched, len(hits))
            if request.cached is None:
                request.cached = request.computed
                self.prompt_tokens += request.prompt_length
                self.cached_prompt_tokens += request.cached
            self.running.append(request)
            step.bound.append(request.id)
            step.new_blocks += [(request.id, i) for i in range(blocks)]
            self.plan_prefill(step, request)

    def commit(self, tokens: list[int]) -> list[Output]:
        step = self.in_flight.pop(0)
        self.landed = step.number
        outputs: list[Output] = []
        sample = -1
        for row in step.rows:
            sample += row.samples
            request = row.request
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

    def ending(self, request: Request, token: int) -> tuple[Finish, int]:
        generated = len(request.tokens) - request.prompt_length
        if token in request.stop_ids and generated >= request.min_tokens:
            return Finish.STOP, token
        if len(request.tokens) >= request.max_length:
            return Finish.LENGTH, -1
        return Finish.NONE, -1
