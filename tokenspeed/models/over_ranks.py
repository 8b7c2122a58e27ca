"""A model over the ranks of a world: this rank's share of it, with what its modules give brought together in between.

To an executor it is a model like any other. Which programs it runs follows from numbers that all ranks know, so that
all of them run the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from tokenspeed.layers.attention import AttentionInput
from tokenspeed.layers.forward import ForwardInput, KVSpec, LayerKV
from tokenspeed.layers.module import Module
from tokenspeed.models.bound_steps import Act, Binder, Held, padded
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.parallel.compiler import compile_model
from tokenspeed.parallel.cost import BOTH, KINDS
from tokenspeed.parallel.program import Program
from tokenspeed.parallel.steps import Select, Step, Transfer, X
from tokenspeed.parallel.world import Member


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a program, before or behind the selection of tokens. `mixed` and `decode` are its steps for any rows
    and for a decode step; `multiple`: of how many rows a rank must have a multiple, so that they can be cut."""

    mixed: list[Act]
    decode: list[Act]
    multiple: int


class OverRanks:
    """`model` is this rank's share, loaded; programs call its modules by paths that begin with `name`.

    Each group of ranks that attends together is given its own tokens, and gets their hidden states and logits. All
    ranks call `forward` and `logits` in the same order.
    """

    def __init__(self, model: CausalLM, world: Member, name: str) -> None:
        self._model, self._world, self._name = model, world, name
        self.kv_spec: list[KVSpec] = model.kv_spec
        self.pieces = None  # programs are of many steps, and their collectives are part of them
        self._groups = world.mesh.size("attn_data")
        self._binder = Binder(dict(_modules(name, model)), world.collectives)
        self._body = functools.cache(self._make_body)
        self._head = functools.cache(self._make_head)
        self._compiled = functools.cache(self._compile)
        self._bound: dict[tuple[Step, ...], _Part] = {}

    def prepared(self, max_tokens: int) -> Self:
        """This model, the programs of all steps of up to `max_tokens` tokens made that are not captured. Each takes
        tenths of a second for a deep model, which a step should not wait for."""
        for power in range(_bucket(max_tokens).bit_length()):
            self._body(1 << power, False)
            self._head(1 << power)
        return self

    def forward(self, inputs: ForwardInput, kv: Sequence[LayerKV]) -> torch.Tensor:
        """Hidden states [T, H] of this group's tokens after the final norm; `kv` has one entry a layer, this rank's
        share of the heads. T may be 0 where other groups have tokens, which `inputs.padded_tokens` then says."""
        own = len(inputs.token_ids)
        tokens = own if inputs.padded_tokens is None else inputs.padded_tokens
        captured = inputs.num_tokens is not None
        part = self._body(tokens if captured else _bucket(tokens), captured)
        rows = _up(tokens, part.multiple)
        held = Held({X: padded(inputs.token_ids, rows)}, own, AttentionInput.of(inputs), kv)
        decode = own == rows and inputs.num_decode == len(inputs.query_lens)
        for act in part.decode if decode else part.mixed:
            act(held)
        return held.tensors[X][:own]

    def logits(self, hidden: torch.Tensor, padded_rows: int | None = None) -> torch.Tensor:
        """hidden [S, H], this group's rows that sample → float32 [S, V]. `padded_rows` is the largest S of all groups,
        None where that is every one's; it counts only where groups share a vocabulary."""
        rows = len(hidden) if padded_rows is None else padded_rows
        part = self._head(_bucket(rows))
        held = Held({X: padded(hidden, _up(rows, part.multiple))})
        for act in part.decode:
            act(held)
        return held.tensors[X][: len(hidden)]

    def _make_body(self, tokens: int, captured: bool) -> _Part:
        program = self._compiled(tokens, captured)
        return self._part(program, _steps(program)[: _steps(program).index(Select())])

    def _make_head(self, rows: int) -> _Part:
        program = self._compiled(rows, False)
        return self._part(program, _steps(program)[_steps(program).index(Select()) + 1 :])

    def _compile(self, tokens: int, captured: bool) -> Program:
        """The program for as many tokens in each group."""
        tokens = max(1, tokens) * self._groups
        mesh, hardware = self._world.mesh, KINDS[BOTH]
        return compile_model(self._model, mesh, self._name, tokens=tokens, hardware=hardware, captured=captured)

    def _part(self, program: Program, steps: tuple[Step, ...]) -> _Part:
        if steps not in self._bound:
            mixed, decode = (self._binder.bind(program, steps, decode=decode) for decode in (False, True))
            self._bound[steps] = _Part(mixed, decode, _multiple(program, steps))
        return self._bound[steps]


def _steps(program: Program) -> tuple[Step, ...]:
    return tuple(planned.step for planned in program.steps)


def _multiple(program: Program, steps: Sequence[Step]) -> int:
    """Into how many parts these steps cut the tokens of a group."""
    ends = [step.stop for step in steps if isinstance(step, Transfer) and step.after == "V"]
    atoms = program.mesh.atoms()[program.chain.takes.depth : max(ends, default=0)]
    return math.prod(atom.size for atom in atoms)


def _bucket(tokens: int) -> int:
    """Programs are made for powers of two: between them the cheapest seldom differs, and each takes time to find."""
    return 1 << max(0, tokens - 1).bit_length()


def _up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def _modules(path: str, module: Module) -> Iterator[tuple[str, Module]]:
    yield path, module
    for name, part in (*module.stages(), *module.beside()):
        yield from _modules(f"{path}.{name}", part)
