"""The steps of a program as callables of one rank: what a step is, and which module it runs, is decided here, once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from tokenspeed.errors import InvariantBroken
from tokenspeed.kernels import ops
from tokenspeed.kernels.platform import Platform
from tokenspeed.layers.attention import Attention, AttentionInput
from tokenspeed.layers.forward import LayerKV
from tokenspeed.layers.mlp import GatedMLP
from tokenspeed.layers.module import Module
from tokenspeed.layers.moe import Experts, MoE, Routed, Router
from tokenspeed.layers.norm import RMSNorm
from tokenspeed.parallel.chain import Block
from tokenspeed.parallel.collectives import Collectives, Exchange, Move, ReducedNorm
from tokenspeed.parallel.program import Program
from tokenspeed.parallel.steps import (
    RESIDUAL,
    Add,
    AllGather,
    AllReduceNorm,
    Combine,
    Copy,
    Dispatch,
    Norm,
    Run,
    Select,
    Slice,
    Step,
    Transfer,
    X,
)


@dataclass(slots=True)
class Held:
    """What a rank holds while it takes the steps of a program.

    `tensors` lie under the program's names. Of those that lie as the model's input does, the first `own` rows are
    tokens of this rank's group, the others padding. `real` says which are tokens, [T] bool, by the number of atoms that
    divide the tokens.
    """

    tensors: dict[str, torch.Tensor]
    own: int = 0
    attention: AttentionInput | None = None
    kv: Sequence[LayerKV] = ()
    real: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def num_tokens(self) -> torch.Tensor | None:
        """As in `ForwardInput`."""
        return None if self.attention is None else self.attention.num_tokens


Act = Callable[[Held], None]
"""One step, done to what a rank holds."""


class Binder:
    """Binds programs of one model, whose `modules` stand under the paths that programs call them by."""

    def __init__(self, modules: Mapping[str, Module], collectives: Collectives) -> None:
        self.modules, self.collectives = modules, collectives
        attention = (path for path, module in modules.items() if isinstance(module, Attention))
        self.layers = {path: index for index, path in enumerate(attention)}

    def bind(self, program: Program, steps: Sequence[Step], *, decode: bool) -> list[Act]:
        """These steps of `program`. For `decode` every row of this rank has one token: blocks then run as composites,
        with the norm before them where nothing is moved between."""
        return _Binding(self, program, decode=decode).acts(steps)


class _Binding:
    def __init__(self, binder: Binder, program: Program, *, decode: bool) -> None:
        self._modules, self._layers = binder.modules, binder.layers
        self._collectives, self._decode = binder.collectives, decode
        self._own_depth = program.chain.takes.depth
        self._blocks = {block.path: block for block in _blocks(program)}
        self._routers = {
            block.exchange.router: block.exchange for block in self._blocks.values() if block.exchange is not None
        }
        self._asked = {exchange.experts for exchange in self._routers.values()}

    def acts(self, steps: Sequence[Step]) -> list[Act]:
        depths = {depth for step in steps if (depth := self._depth_of_routing(step)) is not None}
        acts = [self._tell_padding(sorted(depths))] if depths else []
        folded = False
        for step, after in itertools.zip_longest(steps, steps[1:]):
            assert step is not None
            composite = self._composite(after) if isinstance(step, Norm) else None
            if isinstance(step, Norm) and composite is not None:
                acts.append(composite(self._norm_of(step.module)))
            elif not folded:
                acts += self._acts(step)
            folded = composite is not None
        return acts

    def _acts(self, step: Step) -> Iterator[Act]:
        match step:
            case Dispatch() | Combine():
                return  # with the experts between them, a part of what is bound for the router
            case Transfer():
                yield _moved(step.tensor, self._collectives.move(step))
            case AllReduceNorm():
                norm = self._norm_of(step.module)
                target = ops.Target(Platform.of(norm.weight.device), norm.weight.dtype)
                reduced = self._collectives.all_reduce_norm(step.first, step.stop, target, len(norm.weight))
                yield _reduced_and_normed(norm, reduced)
            case Norm():
                yield _normed(self._norm_of(step.module))
            case Run() if step.module in self._asked:
                return
            case Run():
                yield self._run(step)
            case Copy():
                yield _copied(step.to)
            case Add():
                yield _added(step.term)
            case Select():
                raise InvariantBroken("who samples selects tokens, no step of a rank does")

    def _norm_of(self, path: str) -> RMSNorm:
        norm = self._modules[path]
        assert isinstance(norm, RMSNorm)
        return norm

    def _run(self, run: Run) -> Act:
        composite = self._composite(run)
        if composite is not None:
            return composite(None)
        module = self._modules[run.module]
        match module:
            case Attention():
                return _attention(module, self._layers[run.module])
            case MoE():
                depth = self._blocks[run.module].takes.depth
                return _own_experts(module) if depth == self._own_depth else _experts(module, depth)
            case Router():
                exchange = self._routers[run.module]
                experts = self._modules[exchange.experts]
                assert isinstance(experts, Experts)
                carrier = self._collectives.exchange(exchange.first, exchange.stop)
                return _asked_experts(module, experts, carrier, exchange.stop)
        return _ran(run.tensor, module)

    def _composite(self, run: Step | None) -> Callable[[RMSNorm | None], Act] | None:
        """What makes an act of a block of a decode step and the norm before it; None where that has no form of its own.
        Experts that see other tokens than their rank's own have none: they are told in another way what is padding."""
        if not self._decode or not isinstance(run, Run) or run.tensor != X:
            return None
        module = self._modules[run.module]
        if isinstance(module, Attention):
            return functools.partial(_attention_block, module, self._layers[run.module])
        if isinstance(module, GatedMLP) or (
            isinstance(module, MoE) and self._blocks[run.module].takes.depth == self._own_depth
        ):
            return functools.partial(_feed_forward_block, module)
        return None

    def _depth_of_routing(self, step: Step) -> int | None:
        """By how many atoms those tokens are divided that a step routes, if it has to be told what is padding."""
        if not isinstance(step, Run):
            return None
        if step.module in self._routers:
            return self._routers[step.module].stop
        if not isinstance(self._modules[step.module], MoE):
            return None
        depth = self._blocks[step.module].takes.depth
        return None if depth == self._own_depth else depth

    def _tell_padding(self, depths: Sequence[int]) -> Act:
        """Say of the tokens of each layout which are real."""
        own = self._own_depth
        moves: dict[int, Move] = {}
        for depth in depths:
            if depth < own:
                moves[depth] = self._collectives.move(AllGather(X, depth, own))
            elif depth > own:
                moves[depth] = self._collectives.move(Slice(X, own, depth))

        def act(held: Held) -> None:
            x, count = held.tensors[X], held.num_tokens
            real = torch.arange(len(x), device=x.device) < (held.own if count is None else count)
            held.real = {own: real}
            for depth, move in moves.items():
                held.real[depth] = move(real.byte()).bool()

        return act


def _moved(name: str, move: Move) -> Act:
    def act(held: Held) -> None:
        held.tensors[name] = move(held.tensors[name])

    return act


def _reduced_and_normed(norm: RMSNorm, reduced: ReducedNorm) -> Act:
    weight, eps = norm.weight, norm.eps

    def act(held: Held) -> None:
        tensors = held.tensors
        tensors[X], tensors[RESIDUAL] = reduced(tensors[X], weight, eps, tensors.get(RESIDUAL))

    return act


def _normed(norm: RMSNorm) -> Act:
    def act(held: Held) -> None:
        tensors = held.tensors
        tensors[X], tensors[RESIDUAL] = norm(tensors[X], tensors.get(RESIDUAL))

    return act


def _copied(name: str) -> Act:
    def act(held: Held) -> None:
        held.tensors[name] = held.tensors[X]

    return act


def _added(name: str) -> Act:
    def act(held: Held) -> None:
        held.tensors[X] = held.tensors[X] + held.tensors.pop(name)

    return act


def _ran(name: str, module: Module) -> Act:
    def act(held: Held) -> None:
        held.tensors[name] = module(held.tensors[name])

    return act


def _attention(module: Attention, layer: int) -> Act:
    """Over the tokens alone; what padding gives is zero."""

    def act(held: Held) -> None:
        assert held.attention is not None
        x = held.tensors[X]
        if held.own:
            held.tensors[X] = padded(module(x[: held.own], held.attention, held.kv[layer]), len(x))
        else:
            held.tensors[X] = torch.zeros_like(x)

    return act


def _attention_block(module: Attention, layer: int, norm: RMSNorm | None) -> Act:
    def act(held: Held) -> None:
        assert held.attention is not None
        tensors = held.tensors
        residual = tensors.get(RESIDUAL) if norm is not None else None
        tensors[X], after = module.decode(tensors[X], norm, residual, held.attention, held.kv[layer])
        if after is not None:
            tensors[RESIDUAL] = after

    return act


def _feed_forward_block(module: GatedMLP | MoE, norm: RMSNorm | None) -> Act:
    def act(held: Held) -> None:
        tensors = held.tensors
        residual = tensors.get(RESIDUAL) if norm is not None else None
        tensors[X], after = module.decode(tensors[X], norm, residual, held.num_tokens)
        if after is not None:
            tensors[RESIDUAL] = after

    return act


def _own_experts(module: MoE) -> Act:
    def act(held: Held) -> None:
        held.tensors[X] = module(held.tensors[X], held.num_tokens)

    return act


def _experts(module: MoE, depth: int) -> Act:
    def act(held: Held) -> None:
        x = held.tensors[X]
        held.tensors[X] = module.experts(x, _without_padding(module.gate(x), held.real[depth]))

    return act


def _asked_experts(router: Router, experts: Experts, carrier: Exchange, depth: int) -> Act:
    """Route, send tokens to the ranks whose experts they ask, let these answer, and bring the answers back."""
    num_held = experts.down.shape[0]

    def act(held: Held) -> None:
        x = held.tensors[X]
        sent = carrier.dispatch(x, *_without_padding(router(x), held.real[depth]), num_held)
        y = experts(sent.x, (sent.ids, sent.weights)) if len(sent.x) else sent.x
        held.tensors[X] = carrier.combine(y, sent, len(x))

    return act


def _without_padding(routed: Routed, real: torch.Tensor) -> Routed:
    """The choice of experts, none for tokens that are padding."""
    ids, weights = routed
    return torch.where(real.unsqueeze(-1), ids, -1), torch.where(real.unsqueeze(-1), weights, 0.0)


def padded(x: torch.Tensor, rows: int) -> torch.Tensor:
    """x [T, …] with rows of zeros below, up to `rows`."""
    if len(x) == rows:
        return x
    return torch.cat((x, x.new_zeros(rows - len(x), *x.shape[1:])))


def _blocks(program: Program) -> Iterator[Block]:
    for element in program.chain.elements:
        if isinstance(element, Block):
            yield element
            yield from element.beside
