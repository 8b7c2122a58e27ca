"""Proof that a compiled program is right: it is run on all ranks with symbols in place of numbers.

A tensor is what each rank really holds, in the order in which it lies: rows of feature blocks, each a multiset of
*terms*. A term says which module made it, for which token and block of features, and which of the ranks that share
the sum contributed it. A transfer does to these lists what a collective does to memory. Before each module its input
is compared with what it declared: the tokens that the layout gives this rank, in order, each the whole sum of what
the modules before made, each term once. So a reduction that is missing or done twice, a gather of the wrong ranks, a
residual that stayed behind: each is a difference here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tokenspeed.errors import InvariantBroken
from tokenspeed.parallel.chain import Block, Chain, Exchange, StreamNorm
from tokenspeed.parallel.layout import Layout
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.program import Program
from tokenspeed.parallel.steps import (
    RESIDUAL,
    Add,
    AllGather,
    AllReduce,
    AllReduceNorm,
    AllToAll,
    Combine,
    Copy,
    Dispatch,
    GatherFeatures,
    Norm,
    ReduceScatter,
    Run,
    Select,
    Slice,
    Step,
    Transfer,
    X,
)

Cell = Counter[tuple[str, int, int, tuple[int, ...]]]
"""Terms: who made it, for which token, for which block of features, and where on the atoms of the sum."""

Tensor = list[list[Cell]]
"""What one rank holds: rows of feature blocks."""


class ProgramWrong(InvariantBroken):
    """A compiled program does not do what its modules declare. The message names the step and a rank."""


@dataclass(frozen=True, slots=True)
class Made:
    """What one module gives: `name` made it, and it lies as `layout` says."""

    name: str
    layout: Layout


def verify(program: Program) -> None:
    """Run `program` on symbols. Raises `ProgramWrong` at the first thing that is not as declared."""
    _World(program.chain, program.mesh).run([planned.step for planned in program.steps])


class _World:
    """The tensors of all ranks by name; what x and the stream are when whole; which modules are still to run."""

    def __init__(self, chain: Chain, mesh: Mesh) -> None:
        self._chain, self._mesh = chain, mesh
        self._elements = list(chain.elements)
        self._beside: dict[str, tuple[Block, tuple[Made, ...]]] = {}
        self._exchange: Exchange | None = None
        handed_in = Made("what was handed in", chain.takes)
        self._x: tuple[Made, ...] = (handed_in,)
        self._stream: tuple[Made, ...] = ()
        self._held: dict[str, list[Tensor]] = {X: self._output(handed_in)}
        self._where = "the start"
        self._announce()

    def run(self, steps: Sequence[Step]) -> None:
        for number, step in enumerate(steps):
            self._where = f"step {number}, {step}"
            match step:
                case Transfer():
                    self._transfer(step)
                case Run():
                    self._module(step.module, step.tensor)
                case Norm():
                    self._norm(step.module)
                case AllReduceNorm():
                    self._transfer(AllReduce(X, step.first, step.stop))
                    self._norm(step.module)
                case Copy():
                    self._held[step.to] = self._tensors(X)
                case Add():
                    terms = self._tensors(step.term)
                    self._held[X] = [self._sum(pair) for pair in zip(self._tensors(X), terms, strict=True)]
                    del self._held[step.term]
                case Select():
                    self._expect(X, self._chain.takes, self._x)
        self._where = "the end"
        left = [*(element.path for element in self._elements), *self._beside]
        if left:
            raise ProgramWrong(f"the end: {', '.join(left)} never ran")
        self._expect(X, self._chain.gives, self._x)

    def _announce(self) -> None:
        """What stands beside the next block takes what it takes."""
        if self._elements and isinstance(self._elements[0], Block):
            self._beside |= {other.path: (other, self._x) for other in self._elements[0].beside}

    def _next(self, path: str) -> Block | StreamNorm:
        if not self._elements or self._elements[0].path != path:
            due = self._elements[0].path if self._elements else "nothing"
            raise ProgramWrong(f"{self._where}: {path} runs where {due} is due")
        return self._elements.pop(0)

    def _module(self, path: str, tensor: str) -> None:
        if path in self._beside:
            other, made = self._beside.pop(path)
            self._expect(tensor, other.takes, made)
            self._held[tensor] = self._output(Made(path, other.gives))
            return
        due = self._elements[0] if self._elements else None
        exchange = due.exchange if isinstance(due, Block) else None
        if isinstance(due, Block) and exchange is not None and path == exchange.router and self._exchange is None:
            # The router sees its own tokens, which the dispatch then takes to where they ask.
            self._expect(tensor, due.takes.with_letter(exchange.first, exchange.stop, "V"), self._x)
            self._exchange = exchange
            return
        if due is not None and self._exchange is not None and path == self._exchange.experts:
            path, self._exchange = due.path, None
        block = self._next(path)
        if not isinstance(block, Block) or tensor != X:
            raise ProgramWrong(f"{self._where}: {path} is no block that runs on {tensor}")
        self._expect(X, block.takes, self._x)
        self._held[X] = self._output(Made(path, block.gives))
        self._x = (Made(path, block.gives), *(Made(other.path, other.gives) for other in block.beside))
        self._announce()

    def _norm(self, path: str) -> None:
        """Takes tokens wherever they lie, as long as each is whole and the residual has the same in the same order."""
        if not isinstance(self._next(path), StreamNorm):
            raise ProgramWrong(f"{self._where}: {path} is no norm on the stream")
        x, stream = self._tensors(X), self._held.get(RESIDUAL)
        # From here on what was proven whole goes by a name of its own.
        anywhere = Layout.divided(0, len(self._mesh.atoms()))
        normed, total = Made(path, anywhere), Made(f"the stream at {path}", anywhere)
        outputs: dict[str, list[Tensor]] = {X: [], RESIDUAL: []}
        for rank in range(self._mesh.world):
            tokens = [_token_of(row) for row in x[rank]]
            self._compare(X, rank, x[rank], tokens, self._x)
            if stream is not None:
                self._compare(RESIDUAL, rank, stream[rank], tokens, self._stream)
            outputs[X].append([self._whole((normed,), token) for token in tokens])
            outputs[RESIDUAL].append([self._whole((total,), token) for token in tokens])
        self._held |= outputs
        self._x, self._stream = (normed,), (total,)
        self._announce()

    def _tensors(self, name: str) -> list[Tensor]:
        if name not in self._held:
            raise ProgramWrong(f"{self._where}: there is no {name}")
        return self._held[name]

    def _expect(self, name: str, layout: Layout, made: tuple[Made, ...]) -> None:
        for rank, tensor in enumerate(self._tensors(name)):
            self._compare(name, rank, tensor, self._tokens(rank, layout), made, layout)

    def _compare(
        self,
        name: str,
        rank: int,
        tensor: Tensor,
        tokens: Sequence[int],
        made: tuple[Made, ...],
        layout: Layout | None = None,
    ) -> None:
        """`tensor` must hold these tokens whole, or the part of their features that `layout` gives the rank."""
        if len(tensor) != len(tokens):
            raise ProgramWrong(f"{self._where}: rank {rank} has {len(tensor)} rows of {name}, not {len(tokens)}")
        for token, row in zip(tokens, tensor, strict=True):
            want = self._whole(made, token)
            if layout is not None and layout.ranks(self._mesh, "S") > 1:
                want = _part(want, layout.ranks(self._mesh, "S"), self._place(rank, layout, "S"))
            if row != want:
                raise ProgramWrong(f"{self._where}: rank {rank}, token {token} of {name}: {_difference(row, want)}")

    def _whole(self, made: tuple[Made, ...], token: int) -> list[Cell]:
        """What a token is when all terms of what these modules made are summed, each once."""
        blocks = made[0].layout.ranks(self._mesh, "S")
        return [
            Counter((one.name, token, block, place) for one in made for place in self._places(one.layout))
            for block in range(blocks)
        ]

    def _output(self, made: Made) -> list[Tensor]:
        """What each rank holds when a module has given its output."""
        tensors: list[Tensor] = []
        for rank in range(self._mesh.world):
            place, block = self._digits(rank, made.layout, "P"), self._place(rank, made.layout, "S")
            tokens = self._tokens(rank, made.layout)
            tensors.append([[Counter([(made.name, token, block, place)])] for token in tokens])
        return tensors

    def _transfer(self, transfer: Transfer) -> None:
        tensors = self._tensors(transfer.tensor)
        after = list(tensors)
        for ranks in self._mesh.atom_sets(transfer.first, transfer.stop):
            results = self._collective(transfer, [tensors[rank] for rank in ranks])
            for rank, result in zip(ranks, results, strict=True):
                after[rank] = result
        self._held[transfer.tensor] = after

    def _collective(self, transfer: Transfer, given: list[Tensor]) -> list[Tensor]:
        """What the ranks of one set hold after they held `given`."""
        size = len(given)
        match transfer:
            case AllReduce():
                return [self._sum(given)] * size
            case ReduceScatter() | Combine():
                return self._parted(self._sum(given), size)
            case AllGather() | Dispatch():
                return [[row for tensor in given for row in tensor]] * size
            case Slice():
                return [self._parted(tensor, size)[place] for place, tensor in enumerate(given)]
            case GatherFeatures():
                return [self._beside_each_other(given)] * size
            case AllToAll():
                parts = [self._parted(tensor, size) for tensor in given]
                return [self._beside_each_other([part[place] for part in parts]) for place in range(size)]
        raise ProgramWrong(f"{self._where}: unknown transfer")

    def _sum(self, tensors: Sequence[Tensor]) -> Tensor:
        self._same_shape(tensors)
        return [[sum(cells, Counter()) for cells in zip(*rows, strict=True)] for rows in zip(*tensors, strict=True)]

    def _beside_each_other(self, tensors: Sequence[Tensor]) -> Tensor:
        self._same_shape(tensors)
        return [[cell for row in rows for cell in row] for rows in zip(*tensors, strict=True)]

    def _parted(self, tensor: Tensor, parts: int) -> list[Tensor]:
        if len(tensor) % parts:
            raise ProgramWrong(f"{self._where}: {len(tensor)} rows cannot be cut into {parts} parts")
        size = len(tensor) // parts
        return [tensor[part * size : (part + 1) * size] for part in range(parts)]

    def _same_shape(self, tensors: Sequence[Tensor]) -> None:
        if len({(len(tensor), len(tensor[0])) for tensor in tensors}) > 1:
            raise ProgramWrong(f"{self._where}: the ranks hold tensors of different shapes")

    def _tokens(self, rank: int, layout: Layout) -> range:
        """The tokens that a rank has, of as many as there are ranks, which every layout divides."""
        size = self._mesh.world // layout.ranks(self._mesh, "V")
        place = self._place(rank, layout, "V")
        return range(place * size, (place + 1) * size)

    def _digits(self, rank: int, layout: Layout, letter: str) -> tuple[int, ...]:
        """Where a rank stands on each of the atoms with `letter`."""
        atoms = zip(layout.letters, self._mesh.atoms(), strict=True)
        return tuple(rank // atom.stride % atom.size for has, atom in atoms if has == letter)

    def _place(self, rank: int, layout: Layout, letter: str) -> int:
        """Where a rank stands among those that the atoms with `letter` join, outermost first."""
        place = 0
        sizes = (atom.size for has, atom in zip(layout.letters, self._mesh.atoms(), strict=True) if has == letter)
        for digit, size in zip(self._digits(rank, layout, letter), sizes, strict=True):
            place = place * size + digit
        return place

    def _places(self, layout: Layout) -> Iterator[tuple[int, ...]]:
        atoms = zip(layout.letters, self._mesh.atoms(), strict=True)
        return itertools.product(*(range(atom.size) for has, atom in atoms if has == "P"))


def _part(row: list[Cell], parts: int, place: int) -> list[Cell]:
    size = len(row) // parts
    return row[place * size : (place + 1) * size]


def _token_of(row: list[Cell]) -> int:
    return next(iter(row[0]))[1]


def _difference(row: list[Cell], want: list[Cell]) -> str:
    if len(row) != len(want):
        return f"{len(row)} blocks of features, not {len(want)}"
    for have, should in zip(row, want, strict=True):
        missing, extra = should - have, have - should
        if missing:
            return f"a term of {next(iter(missing))[0]} is missing"
        if extra:
            return f"a term of {next(iter(extra))[0]} is too much"
    return "equal"
