"""What the oracle knows of a request and of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.core.oracle_cache import Block, Copy, Place
from tests.core.oracle_sessions import Session
from tokenspeed.batch import Finish


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
    arrived: float
    patience: float
    floor: float
    promised: bool
    session: Session | None
    rank: float = 0.0
    uncached: int = 0  # tokens, when it was submitted
    state: str = "waiting"  # then fetching, prefilling, decoding, retracting, draining
    blocks: list[Block] = field(default_factory=list)
    prefix: list[Block | Place | Copy | None] = field(default_factory=list)  # while fetching; None: lost
    room: int = 0  # free blocks reserved while fetching
    computed: int = 0
    pending: int = 0
    last_step: int = 0
    cached: int | None = None
    untouched: int | None = None  # blocks that were hits in every admission

    def rank_by(self, tokens: int) -> None:
        self.rank = self.arrived + self.patience * tokens

    @property
    def outside(self) -> bool:
        """Whether it waits for its session to fit."""
        return self.state == "waiting" and self.session is not None and not self.session.resident

    @property
    def order(self) -> tuple[int, int]:
        """Who keeps its memory: the first."""
        return self.priority, self.arrival

    @property
    def precedence(self) -> tuple[int, float, int]:
        """Who computes its prompt: the first."""
        return self.priority, self.rank, self.arrival


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
    tokens: int
    """What is left of the budget."""
    rows: list[Row] = field(default_factory=list)
    num_decode: int = 0
    preempted: bool = False
    bound: list[int] = field(default_factory=list)  # request ids
    released: list[int | None] = field(default_factory=list)  # likewise; None: a slot that was never bound
    new_blocks: list[tuple[int, int]] = field(default_factory=list)  # (request id, position in its table)
    copies: list[Copy] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not (self.rows or self.bound or self.copies)


@dataclass(frozen=True)
class Output:
    request_id: int
    sample: int
    token: int
    num_tokens: int
    finish: Finish
    stop_id: int
