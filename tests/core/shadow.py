"""A device that remembers, for every position of every KV block, what was written there, by whom and when.

What a position means is the whole chain of tokens up to it, so a row that reads a block with the right token after
the wrong prefix is caught, like one that reads another tenant's block. Steps run in launch order, each at any
moment between its launch and its landing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from tokenspeed.batch import NOT_FINITE, ON_DEVICE, Plan


class Chains:
    """Interned token chains: equal numbers mean equal salts and equal tokens from the first one on."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[int, int] | bytes, int] = {}

    def root(self, salt: bytes) -> int:
        return self.numbers.setdefault(salt, len(self.numbers))

    def next(self, chain: int, token: int) -> int:
        return self.numbers.setdefault((chain, token), len(self.numbers))


def next_token(chain: int, vocab: int) -> int:
    """The model: a function of all tokens so far."""
    return (chain * 2654435761 >> 7) % vocab


@dataclass(frozen=True)
class Cell:
    chain: int
    writer: int  # request id
    step: int


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
    touched: set[int] = field(default_factory=set)  # blocks
    written: set[int] = field(default_factory=set)
    tokens: list[int] | None = None  # the samples, once it has run


class Shadow:
    """`num_blocks` blocks of `block_size` positions. Every promise of a plan that breaks is an AssertionError."""

    def __init__(self, num_blocks: int, block_size: int, num_slots: int, vocab: int, rng: np.random.Generator) -> None:
        self.size = block_size
        self.vocab = vocab
        self.rng = rng
        self.chains = Chains()
        self.memory: list[list[Cell | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.truth: dict[int, Truth] = {}
        # As planned: what the host has been promised so far.
        self.owner: dict[int, int] = {}  # slot → request id
        self.tables: dict[int, dict[int, int]] = {}  # slot → position → block
        self.launched: list[Launched] = []
        # As run.
        self.run_tables: dict[int, dict[int, int]] = {}
        self.last_token: dict[int, int] = {}
        self.bound_at: dict[int, int] = {}  # slot → step
        self.failed_at: dict[int, int] = {}  # request id → step in flight when its failure was known
        self.not_finite = 0.02
        self.reads = 0

    def submit(self, request_id: int, prompt: Iterable[int], salt: bytes) -> None:
        root = chain = self.chains.root(salt)
        chains = [chain := self.chains.next(chain, token) for token in prompt]
        self.truth[request_id] = Truth(root, chains)

    def launch(self, plan: Plan) -> Launched:
        """Take in a plan, checking all that can be checked before it runs."""
        step = Launched(plan.step, [], [], plan.released.tolist(), [])
        for slot in step.released:
            assert not any(slot == row[0] for other in self.launched for row in other.rows), "released before landing"
            del self.owner[slot], self.tables[slot]
        for (slot, index), request_id in zip(plan.bound.tolist(), plan.bound_ids.tolist(), strict=True):
            assert index == len(step.bound) and slot not in self.owner, "a slot is bound twice"
            assert not any(slot == row[0] for other in self.launched for row in other.rows), "a slot is bound early"
            self.owner[slot] = request_id
            self.tables[slot] = {}
            step.bound.append((slot, request_id))
        self.take_rows(plan, step)
        self.take_deltas(plan, step)
        for slot, _, new, computed, _, _ in step.rows:
            table = self.tables[slot]
            blocks = [table[p] for p in range(-(-(computed + new) // self.size))]
            step.touched.update(blocks)
            written = blocks[computed // self.size :]
            step.written.update(written)
            for other, their in self.tables.items():
                assert other == slot or not set(their.values()) & set(written), "a block is written and shared"
        self.launched.append(step)
        return step

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
        computed = {row[0]: row[3] for row in step.rows}
        for slot, position, block in plan.table_delta.tolist():
            assert position == len(self.tables[slot]), "a block table has a hole"
            assert 0 <= block < len(self.memory)
            for other in self.launched:
                if position < computed[slot] // self.size:
                    assert block not in other.written, "a hit on a block that a launched step still writes"
                else:
                    assert block not in other.touched, "a block is handed out before its last step has landed"
            self.tables[slot][position] = block
            step.deltas.append((slot, position, block))

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
