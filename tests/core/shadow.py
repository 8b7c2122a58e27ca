"""A device and a host that remember, for every position of every KV block, what was written there, by whom and when.

What a position means is the whole chain of tokens up to it, so a row that reads a block with the right token after
the wrong prefix is caught, like one that reads another tenant's block. Steps run in launch order, each at any
moment between its launch and its landing. A copy moves its block when it lands; one that fails leaves garbage.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from tokenspeed.batch import NOT_FINITE, ON_DEVICE, Plan

TO_HOST, TO_DEVICE = 0, 1
NOWHERE = -2
"""The chain of garbage: equal to no other."""


class Chains:
    """Interned token chains: equal numbers mean equal salts and equal tokens from the first one on."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, int] | bytes, int] = {}

    def root(self, salt: bytes) -> int:
        return self.numbers.setdefault(salt, len(self.numbers))

    def next(self, chain: int, token: int) -> int:
        return self.numbers.setdefault((chain, token), len(self.numbers))

    def of(self, salt: bytes, tokens: Iterable[int]) -> list[int]:
        """The chain of each of these tokens."""
        chain = self.root(salt)
        return [chain := self.next(chain, token) for token in tokens]


def next_token(chain: int, vocab: int) -> int:
    """The model: a function of all tokens so far."""
    return (chain * 2654435761 >> 7) % vocab


@dataclass(frozen=True)
class Cell:
    chain: int
    writer: int  # request id
    step: int


@dataclass(frozen=True)
class Move:
    """A copy under way between the device block and the place on the host."""

    direction: int
    block: int
    place: int


@dataclass
class Truth:
    """What a request is: its chain of tokens, as the device itself has made it."""

    root: int
    chains: list[int]
    broken: bool = False  # its logits were not finite: nothing it computes from then on means anything


@dataclass
class Launched:
    """A step's own copy of everything that it was told."""

    number: int
    rows: list[tuple[int, int, int, int, list[int], bool]]  # slot, request, new, computed, token ids, samples
    deltas: list[tuple[int, int, int]]
    released: list[int]
    bound: list[tuple[int, int]]
    tickets: list[int]
    touched: set[int] = field(default_factory=set)  # blocks
    written: set[int] = field(default_factory=set)
    tokens: list[int] | None = None  # the samples, once it has run


class Shadow:
    """`num_blocks` blocks of `block_size` positions, and places for `num_host_blocks` more on the host.

    Every promise of a plan that breaks is an AssertionError.
    """

    def __init__(
        self, num_blocks: int, num_host_blocks: int, block_size: int, vocab: int, rng: np.random.Generator
    ) -> None:
        self.size = block_size
        self.vocab = vocab
        self.rng = rng
        self.chains = Chains()
        self.memory: list[list[Cell | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.host: list[list[Cell | None]] = [[None] * block_size for _ in range(num_host_blocks)]
        self.truth: dict[int, Truth] = {}
        # As planned: what the host has been promised so far.
        self.owner: dict[int, int] = {}  # slot → request id
        self.tables: dict[int, dict[int, int]] = {}  # slot → position → block
        self.borrowed: dict[int, set[int]] = {}  # slot → positions that a step in flight touched when it was bound
        self.launched: list[Launched] = []
        self.moves: dict[int, Move] = {}  # ticket → copy under way
        # As run.
        self.run_tables: dict[int, dict[int, int]] = {}
        self.last_token: dict[int, int] = {}
        self.bound_at: dict[int, int] = {}  # slot → step
        self.failed_at: dict[int, int] = {}  # request id → step in flight when its failure was known
        self.not_finite = 0.02
        self.reads = 0

    def submit(self, request_id: int, prompt: Iterable[int], salt: bytes) -> None:
        self.truth[request_id] = Truth(self.chains.root(salt), self.chains.of(salt, prompt))

    def launch(self, plan: Plan) -> Launched:
        """Take in a plan, checking all that can be checked before it runs."""
        step = Launched(plan.step, [], [], plan.released.tolist(), [], [])
        assert len(set(step.released)) == len(step.released), "a slot is released twice"
        for slot in step.released:
            assert not self.in_use(slot), "a slot is released before its last step has landed"
            if slot in self.owner:  # else it was taken for a request that left before it was bound
                del self.owner[slot], self.tables[slot]
        for (slot, index), request_id in zip(plan.bound.tolist(), plan.bound_ids.tolist(), strict=True):
            assert index == len(step.bound) and slot not in self.owner, "a slot is bound twice"
            assert not self.in_use(slot), "a slot is bound early"
            self.owner[slot] = request_id
            self.tables[slot] = {}
            self.borrowed[slot] = set()
            step.bound.append((slot, request_id))
        self.take_rows(plan, step)
        self.take_deltas(plan, step)
        for slot, _, new, computed, _, _ in step.rows:
            table = self.tables[slot]
            blocks = [table[p] for p in range(-(-(computed + new) // self.size))]
            own = range(computed // self.size, len(table))
            assert not self.borrowed.pop(slot, set()).intersection(own), "a block was handed out before it had landed"
            step.touched.update(blocks)
            written = blocks[computed // self.size :]
            step.written.update(written)
            for other, their in self.tables.items():
                assert other == slot or not set(their.values()) & set(written), "a block is written and shared"
        self.launched.append(step)
        self.take_copies(plan, step)
        return step

    def in_use(self, slot: int) -> bool:
        return any(slot == row[0] for step in self.launched for row in step.rows)

    def take_rows(self, plan: Plan, step: Launched) -> None:
        start = 0
        samples = set(plan.sample_rows.tolist())
        for row in range(plan.num_rows):
            slot, new, computed = int(plan.row_slot[row]), int(plan.row_new[row]), int(plan.row_computed[row])
            token_ids = plan.token_ids[start : start + new].tolist()
            start += new
            step.rows.append((slot, self.owner[slot], new, computed, token_ids, row in samples))
        assert start == plan.num_tokens
        assert len({row[0] for row in step.rows}) == len(step.rows), "a slot has two rows"

    def take_deltas(self, plan: Plan, step: Launched) -> None:
        for slot, position, block in plan.table_delta.tolist():
            assert position == len(self.tables[slot]), "a block table has a hole"
            assert 0 <= block < len(self.memory)
            assert block not in self.moving_blocks(), "a block is handed out while it is being copied"
            for other in self.launched:
                assert block not in other.written, "a block is handed out before its last writer has landed"
                if block in other.touched:  # right for a hit: the request's first row tells which are hits
                    assert slot in self.borrowed, "a block is handed out before its last reader has landed"
                    self.borrowed[slot].add(position)
            self.tables[slot][position] = block
            step.deltas.append((slot, position, block))

    # --- copies ---

    def moving_blocks(self) -> set[int]:
        return {move.block for move in self.moves.values()}

    def take_copies(self, plan: Plan, step: Launched) -> None:
        held = {block for table in self.tables.values() for block in table.values()}
        touched = {block for launched in self.launched for block in launched.touched}
        for ticket, direction, source, target in plan.copies.tolist():
            block, place = (source, target) if direction == TO_HOST else (target, source)
            assert direction in (TO_HOST, TO_DEVICE) and ticket not in self.moves, "a ticket is given twice"
            assert block not in self.moving_blocks(), "a block is copied twice at once"
            assert all(place != move.place for move in self.moves.values()), "a place is copied twice at once"
            assert block not in held and block not in touched, "a block is copied while somebody uses it"
            self.moves[ticket] = Move(direction, block, place)
            step.tickets.append(ticket)

    def content(self, ticket: int) -> list[int]:
        """The chains that a copy carries."""
        move = self.moves[ticket]
        source = self.memory[move.block] if move.direction == TO_HOST else self.host[move.place]
        return [cell.chain if cell else NOWHERE for cell in source]

    def land_copy(self, ticket: int, *, failed: bool) -> None:
        move = self.moves.pop(ticket)
        device, host = self.memory[move.block], self.host[move.place]
        source, target = (device, host) if move.direction == TO_HOST else (host, device)
        target[:] = [Cell(NOWHERE, -1, 0)] * self.size if failed else source

    # --- as run ---

    def run(self, step: Launched) -> None:
        """Execute a step: read every position before each row, write the row's own, sample."""
        for slot in step.released:
            self.run_tables.pop(slot, None)
        for slot, _ in step.bound:
            self.run_tables[slot] = {}
            self.bound_at[slot] = step.number
        for slot, position, block in step.deltas:
            self.run_tables[slot][position] = block
        step.tokens = []
        for slot, request_id, new, computed, token_ids, samples in step.rows:
            truth = self.truth[request_id]
            table = self.run_tables[slot]
            for position in range(computed):
                self.read(slot, request_id, truth, table[position // self.size], position)
            for position, given in enumerate(token_ids, computed):
                token = self.last_token[slot] if given == ON_DEVICE else given
                chain = self.chains.next(truth.chains[position - 1] if position else truth.root, token)
                assert truth.broken or chain == truth.chains[position], "a row computes another token than its own"
                self.memory[table[position // self.size]][position % self.size] = Cell(chain, request_id, step.number)
            if samples:
                step.tokens.append(self.sample(slot, truth, computed + new))

    def read(self, slot: int, request_id: int, truth: Truth, block: int, position: int) -> None:
        cell = self.memory[block][position % self.size]
        self.reads += 1
        assert cell is not None, "a row reads a position that was never written"
        if truth.broken:
            return
        assert cell.chain == truth.chains[position], "a row reads another sequence's KV"
        failed = self.failed_at.get(cell.writer)
        assert cell.writer == request_id or failed is None or self.bound_at[slot] <= failed, "a hit on withdrawn KV"

    def sample(self, slot: int, truth: Truth, position: int) -> int:
        assert truth.broken or position >= len(truth.chains), "a token is sampled twice"
        if self.rng.random() < self.not_finite:
            truth.broken = True
            self.last_token[slot] = 0
            truth.chains.append(-1)
            return NOT_FINITE
        token = next_token(truth.chains[-1], self.vocab)
        truth.chains.append(self.chains.next(truth.chains[-1], token))
        self.last_token[slot] = token
        return token

    def land(self) -> list[int]:
        """The samples of the oldest step, run now at the latest."""
        step = self.launched.pop(0)
        if step.tokens is None:
            self.run(step)
        assert step.tokens is not None
        return step.tokens

    def run_some(self) -> None:
        """Run the oldest launched step that has not run, if any."""
        for step in self.launched:
            if step.tokens is None:
                return self.run(step)
        return None

    def failed(self, request_id: int, last_launched: int) -> None:
        """The host knows that a request failed: nobody admitted from now on may read what it wrote."""
        self.failed_at[request_id] = last_launched
