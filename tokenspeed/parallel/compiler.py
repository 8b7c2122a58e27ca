"""The static compiler: from what modules declare to what every rank does, when a model is built.

Norms on the residual stream work on each token by itself, so they are free in where they lie. The compiler chooses a
layout for each: a shortest path along the chain embedding → (norm → block)* → norm → LM head, whose states are the
layouts of whole tokens, and whose steps cost what it takes to reduce the block before into the layout, to move the
residual there, to norm, and to bring the result to what the next block takes. Out come the forms that are known by
names of their own: all-reduce and norm in one (tensor parallelism), reduce-scatter, norm, all-gather (sequence
parallelism, a reduction deferred past the norm), the same over more ranks where attention has tokens of its own (data
parallel attention with expert parallelism). Which one is cheapest depends on the number of tokens, so a program is
compiled for a number of tokens. Everything here is deterministic: ranks that compile alike communicate alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.errors import ConfigError
from tokenspeed.parallel.chain import TOKEN_ID_BYTES, Block, Chain, Placed, StreamNorm, chain_of
from tokenspeed.parallel.cost import Hardware, local_rows
from tokenspeed.parallel.layout import Layout
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.program import Program
from tokenspeed.parallel.routes import Routes
from tokenspeed.parallel.steps import (
    RESIDUAL,
    Add,
    AllReduce,
    AllReduceNorm,
    Combine,
    Copy,
    Dispatch,
    Norm,
    Planned,
    Run,
    Select,
    X,
)

Steps = tuple[Planned, ...]


@dataclass(frozen=True, slots=True)
class _Reached:
    """A layout of the stream, the steps that lead there, and what they cost."""

    seconds: float
    steps: Steps

    def then(self, steps: Steps) -> _Reached:
        return _Reached(self.seconds + _seconds(steps), self.steps + steps)


@dataclass(frozen=True, slots=True)
class _Form:
    """One way to run a block: where its input has to lie, the steps, where its output then lies."""

    takes: Layout
    steps: Steps
    gives: Layout


@dataclass(frozen=True, slots=True)
class _Goal:
    """Where x is brought, and what takes it there."""

    layout: Layout
    name: str
    norm: StreamNorm | None = None


def compile_model(
    model: Placed,
    mesh: Mesh,
    name: str,
    *,
    tokens: int = 1,
    rows: int | None = None,
    hardware: Hardware | None = None,
    captured: bool = False,
) -> Program:
    """The program of `model` over `mesh` for steps of `tokens` tokens in all, `rows` of which are sampled from
    (without it, all of them: a decode step). One for steps that are `captured` leaves out what the host would have to
    wait for: tokens go to all ranks, not to those alone that they ask.

    Raises `ConfigError` naming both modules of a hand-over that cannot be.
    """
    chain = chain_of(model, mesh, name)
    hardware = Hardware() if hardware is None else hardware
    rows = tokens if rows is None else rows
    steps = _Compiler(chain, mesh, tokens, rows, hardware, captured=captured).best()
    return Program(mesh, chain, tokens, rows, hardware, steps, captured)


class _Compiler:
    def __init__(
        self, chain: Chain, mesh: Mesh, tokens: int, rows: int, hardware: Hardware, *, captured: bool
    ) -> None:
        self._chain, self._mesh, self._hardware = chain, mesh, hardware
        self._tokens, self._rows, self._captured = tokens, rows, captured
        self._routes = Routes(mesh, hardware)

    def best(self) -> Steps:
        """The cheapest program."""
        chain = self._chain
        reached = {chain.takes: _Reached(0.0, ())}
        source, row_bytes, residual = chain.name, TOKEN_ID_BYTES, False
        blocks: list[Block] = []
        for element in chain.elements:
            if isinstance(element, Block):
                blocks.append(element)
                continue
            reached = self._advance(reached, blocks, self._goals(element), source, row_bytes, residual)
            source, row_bytes, residual, blocks = element.path, element.row_bytes, True, []
        # Nobody needs the stream behind the last norm.
        end = _Goal(chain.gives, f"whoever runs {chain.name}")
        return self._advance(reached, blocks, [end], source, row_bytes, False)[end.layout].steps

    def _goals(self, norm: StreamNorm) -> list[_Goal]:
        """Wherever a norm may be."""
        atoms = len(self._mesh.atoms())
        return [_Goal(Layout.divided(depth, atoms), norm.path, norm) for depth in range(atoms + 1)]

    def _advance(
        self,
        reached: dict[Layout, _Reached],
        blocks: list[Block],
        goals: list[_Goal],
        source: str,
        row_bytes: int,
        residual: bool,
    ) -> dict[Layout, _Reached]:
        """From each layout of the stream, through the blocks, to each goal: the cheapest way to each."""
        found: dict[Layout, _Reached] = {}
        for goal in goals:
            ways = []
            for layout, way in reached.items():
                steps = self._through(blocks, layout, goal, source, row_bytes)
                if residual:
                    moved = self._move(layout, goal.layout, RESIDUAL, self._tokens, row_bytes, source, goal.name)
                    steps = (*steps[:-1], *moved, steps[-1])
                ways.append(way.then(steps))
            found[goal.layout] = min(ways, key=lambda way: (way.seconds, len(way.steps)))
        return found

    def _through(
        self, blocks: list[Block], layout: Layout, goal: _Goal, source: str, row_bytes: int, *, selected: bool = False
    ) -> Steps:
        """x from where it lies through the blocks, one after the other, to the goal. What needs sampled tokens alone
        gets them from the layout in which they arrived, because there each group knows its own."""
        tokens = self._rows if selected else self._tokens
        if not blocks:
            return self._arrive(layout, goal, source, row_bytes, tokens)
        block, *rest = blocks
        if block.sampled_only and not selected:
            own = self._chain.takes
            moved = self._move(layout, own, X, tokens, row_bytes, source, block.path)
            return (*moved, Planned(Select()), *self._through(blocks, own, goal, source, row_bytes, selected=True))
        after = _Goal(rest[0].takes, rest[0].path) if rest else goal
        forms = self._forms(block, row_bytes, tokens)
        ways = [self._around(block, form, layout, after, source, row_bytes, tokens) for form in forms]
        best = min(ways, key=lambda steps: (_seconds(steps), len(steps)))
        if rest:
            best += self._through(rest, after.layout, goal, block.path, block.row_bytes, selected=selected)
        return best

    def _forms(self, block: Block, row_bytes: int, tokens: int) -> list[_Form]:
        """The ways to run a block: as it declares, and with tokens sent to those experts alone that they ask."""
        forms = [_Form(block.takes, (Planned(Run(block.path, X)),), block.gives)]
        exchange = block.exchange
        if exchange is not None and not self._captured:
            first, stop, fan_out = exchange.first, exchange.stop, exchange.fan_out
            takes = block.takes.with_letter(first, stop, "V")
            dispatch = Dispatch(X, first, stop)
            # With a token go the ids of its experts and their weights, 4 bytes each.
            sending = (dispatch, takes, self._mesh, tokens, row_bytes + 8 * fan_out, fan_out)
            combine = Combine(X, first, stop)
            returning = (combine, block.gives, self._mesh, tokens, block.row_bytes, fan_out)
            hardware = self._hardware
            steps = (
                Planned(Run(exchange.router, X)),
                Planned(dispatch, hardware.sent(*sending), hardware.seconds(*sending)),
                Planned(Run(exchange.experts, X)),
                Planned(combine, hardware.sent(*returning), hardware.seconds(*returning)),
            )
            forms.append(_Form(takes, steps, combine.applied(block.gives)))
        return forms

    def _around(
        self, block: Block, form: _Form, layout: Layout, goal: _Goal, source: str, row_bytes: int, tokens: int
    ) -> Steps:
        """x from where it lies into a block and those beside it, and their sum to the goal.

        Where both take, or give, the same layout, it is moved once for both.
        """
        steps: list[Planned] = []
        apart = [other for other in block.beside if other.takes != form.takes]
        for other in apart:
            steps.append(Planned(Copy(other.path)))
            steps += self._move(layout, other.takes, other.path, tokens, row_bytes, source, other.path)
        steps += self._move(layout, form.takes, X, tokens, row_bytes, source, block.path)
        steps += (Planned(Copy(other.path)) for other in block.beside if other not in apart)
        steps += form.steps
        steps += (Planned(Run(other.path, other.path)) for other in block.beside)
        alike = [other for other in block.beside if other.gives == form.gives]
        steps += (Planned(Add(other.path)) for other in alike)
        late = [other for other in block.beside if other not in alike]
        for other in late:
            steps += self._move(other.gives, goal.layout, other.path, tokens, block.row_bytes, other.path, goal.name)
        if not late:
            return (*steps, *self._arrive(form.gives, goal, block.path, block.row_bytes, tokens))
        steps += self._move(form.gives, goal.layout, X, tokens, block.row_bytes, block.path, goal.name)
        steps += (Planned(Add(other.path)) for other in late)
        return (*steps, *self._arrive(goal.layout, goal, block.path, block.row_bytes, tokens))

    def _arrive(self, layout: Layout, goal: _Goal, source: str, row_bytes: int, tokens: int) -> Steps:
        """x from where it lies to the goal and through its norm, which an all-reduce before it takes in."""
        if goal.norm is None:
            return self._move(layout, goal.layout, X, tokens, row_bytes, source, goal.name)
        rows = local_rows(tokens, goal.layout, self._mesh)
        alone, fused = (self._hardware.norm_seconds(rows, row_bytes, fused=fused) for fused in (False, True))
        moved = self._move(layout, goal.layout, X, tokens, row_bytes, source, goal.name, saved=alone - fused)
        last = moved[-1] if moved else None
        if last is not None and isinstance(last.step, AllReduce):
            first, stop = last.step.first, last.step.stop
            before = goal.layout.with_letter(first, stop, AllReduce.before)
            reduced = self._hardware.reduced_seconds(last.step, before, self._mesh, tokens, row_bytes)
            step = AllReduceNorm(goal.norm.path, first, stop)
            return (*moved[:-1], Planned(step, last.sent, reduced + fused, kept=alone))
        return (*moved, Planned(Norm(goal.norm.path), 0, alone))

    def _move(
        self,
        start: Layout,
        end: Layout,
        tensor: str,
        tokens: int,
        row_bytes: int,
        source: str,
        target: str,
        *,
        saved: float = 0.0,
    ) -> Steps:
        route = self._routes.find(start, end, tensor, tokens, row_bytes, saved=saved)
        if route is None:
            raise ConfigError(
                f"{source} gives {start}, but {target} takes {end} (R: replicated, P: sum, V: tokens, S: features over "
                f"the atoms of {self._mesh}): no transfer makes one of the other"
            )
        return route.steps


def _seconds(steps: Steps) -> float:
    return sum(planned.seconds for planned in steps)
