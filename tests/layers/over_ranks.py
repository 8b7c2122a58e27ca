"""All ranks of a mesh in one process: the modules of each with its share of the weights, and a compiled program that
moves tensors between them. Only what carries the collectives is missing to a real run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.checkpoint.weights import load_weights, tensor_shapes
from tokenspeed.kernels.forms import ROWS
from tokenspeed.layers.attention import Attention, AttentionInput
from tokenspeed.layers.forward import ForwardInput, LayerKV
from tokenspeed.layers.module import BuildContext, Module
from tokenspeed.layers.moe import Experts, Router
from tokenspeed.models.causal_lm import CausalLM
from tokenspeed.models.registry import make_model
from tokenspeed.parallel.compiler import compile_model
from tokenspeed.parallel.mesh import Mesh
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
    Slice,
    Step,
    Transfer,
    X,
)

BLOCK = 16
NAME = "m"

Parts = list[torch.Tensor]


def models_of(folder: Path, mesh: Mesh, device: str, plain_form: str = ROWS) -> list[CausalLM]:
    """The model of every rank, its weights not yet loaded."""

    def context(rank: int) -> BuildContext:
        return BuildContext.of(
            device=torch.device(device),
            dtype=torch.float32,
            max_positions=64,
            block_size=BLOCK,
            mesh=mesh,
            rank=rank,
            plain_form=plain_form,
        )

    config = read_model_config(resolve(str(folder)))
    return [make_model(config, context(rank)) for rank in range(mesh.world)]


class Ranks:
    """A model over `mesh`. Each group of ranks that attends together has the same number of sequences of its own, each
    in one block of the cache."""

    def __init__(self, folder: Path, mesh: Mesh, sequences: int) -> None:
        self.mesh = mesh
        self.models = models_of(folder, mesh, "cpu")
        for model in self.models:
            load_weights(model, resolve(str(folder)))
        self.modules = [dict(_modules(NAME, model)) for model in self.models]
        self.kv = [
            [tuple(torch.zeros(sequences, BLOCK, *shape) for _, shape in spec.tensors) for spec in model.kv_spec]
            for model in self.models
        ]
        self.length = 0
        self.norm: str | None = None

    def step(self, tokens: torch.Tensor, *, planned_tokens: int) -> torch.Tensor:
        """The next tokens [groups, sequences, n] of all sequences → their logits [groups, sequences, n, V], by the
        program for steps of `planned_tokens` tokens. Every rank of a group has to have the same."""
        program = compile_model(self.models[0], self.mesh, NAME, tokens=planned_tokens)
        ranks = range(self.mesh.world)
        groups = [self.mesh.coordinate(rank, "attn_data") for rank in ranks]
        self.inputs = [AttentionInput.of(self._forward_input(tokens[group])) for group in groups]
        self.held: dict[str, Parts] = {X: [tokens[group].flatten() for group in groups]}
        self.routed: list[tuple[torch.Tensor, torch.Tensor]] = []
        steps = [planned.step for planned in program.steps]
        for step, after in itertools.zip_longest(steps, steps[1:]):
            self._one(step, after, decode=tokens.shape[-1] == 1)
        self.length += tokens.shape[-1]
        of_group = {group: self.held[X][rank] for rank, group in enumerate(groups)}
        for rank, group in enumerate(groups):
            torch.testing.assert_close(self.held[X][rank], of_group[group], rtol=0, atol=1e-5)
        return torch.stack([of_group[group].view(*tokens.shape[1:], -1) for group in sorted(of_group)])

    def _forward_input(self, tokens: torch.Tensor) -> ForwardInput:
        rows, new = tokens.shape
        end = self.length + new
        positions = torch.arange(self.length, end).repeat(rows)
        return ForwardInput(
            token_ids=tokens.flatten(),
            positions=positions,
            kv_slots=positions + torch.arange(rows).repeat_interleave(new) * BLOCK,
            query_start=torch.arange(rows + 1, dtype=torch.int32) * new,
            kv_len=torch.full((rows,), end, dtype=torch.int32),
            block_table=torch.arange(rows, dtype=torch.int32)[:, None],
            num_decode=rows if new == 1 else 0,
            query_lens=(new,) * rows,
            kv_lens=(end,) * rows,
            block_size=BLOCK,
        )

    def _one(self, step: Step, after: Step | None, *, decode: bool) -> None:
        match step:
            case Transfer():
                self._transfer(step)
            case AllReduceNorm():
                self._transfer(AllReduce(X, step.first, step.stop))
                self._one(Norm(step.module), after, decode=decode)
            case Norm() if decode and isinstance(after, Run) and after.module.endswith((".self_attn", ".mlp")):
                # Where nothing is moved between them, a block of a decode step begins with its norm.
                self.norm = step.module
            case Norm():
                self._norm(step.module)
            case Run() if self.norm is not None:
                self._block(self.norm, step.module)
                self.norm = None
            case Run():
                self.held[step.tensor] = [
                    self._run(rank, step.module, x) for rank, x in enumerate(self.held[step.tensor])
                ]
            case Copy():
                self.held[step.to] = list(self.held[X])
            case Add():
                terms = self.held.pop(step.term)
                self.held[X] = [x + term for x, term in zip(self.held[X], terms, strict=True)]

    def _norm(self, path: str) -> None:
        before = self.held.get(RESIDUAL, [None] * self.mesh.world)
        pairs = [self.modules[rank][path](x, before[rank]) for rank, x in enumerate(self.held[X])]
        self.held[X], self.held[RESIDUAL] = [x for x, _ in pairs], [residual for _, residual in pairs]

    def _block(self, norm: str, path: str) -> None:
        before = self.held.get(RESIDUAL, [None] * self.mesh.world)
        pairs = []
        for rank, x in enumerate(self.held[X]):
            module: Any = self.modules[rank][path]
            places = (None,) if not isinstance(module, Attention) else self._places(rank, path)
            pairs.append(module.decode(x, self.modules[rank][norm], before[rank], *places))
        self.held[X], self.held[RESIDUAL] = [x for x, _ in pairs], [residual for _, residual in pairs]

    def _places(self, rank: int, path: str) -> tuple[AttentionInput, LayerKV]:
        """Where a layer's attention finds the tokens of this rank's rows."""
        layers = [name for name, other in self.modules[rank].items() if isinstance(other, Attention)]
        return self.inputs[rank], self.kv[rank][layers.index(path)]

    def _run(self, rank: int, path: str, x: torch.Tensor) -> torch.Tensor:
        module: Any = self.modules[rank][path]
        if isinstance(module, Attention):
            return module(x, *self._places(rank, path))
        if isinstance(module, Router):
            self.routed = [*self.routed[:rank], module(x)]
            return x
        if isinstance(module, Experts):
            return module(x, self.routed[rank])
        return module(x)

    def _transfer(self, transfer: Transfer) -> None:
        self.held[transfer.tensor] = self._met(transfer, self.held[transfer.tensor])
        if isinstance(transfer, Dispatch):
            ids, weights = (self._met(transfer, [routed[i] for routed in self.routed]) for i in range(2))
            self.routed = list(zip(ids, weights, strict=True))

    def _met(self, transfer: Transfer, parts: Parts) -> Parts:
        after = list(parts)
        for ranks in self.mesh.atom_sets(transfer.first, transfer.stop):
            for place, rank in enumerate(ranks):
                after[rank] = COLLECTIVES[type(transfer)]([parts[other] for other in ranks], place)
        return after


def _sum(parts: Parts) -> torch.Tensor:
    return torch.stack(parts).sum(0)


def _chunk(whole: torch.Tensor, parts: Sequence[torch.Tensor], place: int) -> torch.Tensor:
    assert len(whole) % len(parts) == 0
    return whole.chunk(len(parts))[place]


COLLECTIVES: dict[type[Transfer], Callable[[Parts, int], torch.Tensor]] = {
    AllReduce: lambda parts, place: _sum(parts),
    ReduceScatter: lambda parts, place: _chunk(_sum(parts), parts, place),
    Combine: lambda parts, place: _chunk(_sum(parts), parts, place),
    AllGather: lambda parts, place: torch.cat(parts),
    Dispatch: lambda parts, place: torch.cat(parts),
    Slice: lambda parts, place: _chunk(parts[place], parts, place),
    GatherFeatures: lambda parts, place: torch.cat(parts, -1),
    AllToAll: lambda parts, place: torch.cat([_chunk(part, parts, place) for part in parts], -1),
}
"""What the rank at a place of a set has after all of it have met."""


def _modules(path: str, module: Module) -> Iterator[tuple[str, Module]]:
    yield path, module
    for name, part in (*module.stages(), *module.beside()):
        yield from _modules(f"{path}.{name}", part)


def times_held(models: Sequence[Module]) -> dict[str, torch.Tensor]:
    """How many ranks hold each element of each checkpoint tensor; the models are those of all ranks."""
    counts = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in tensor_shapes(models[0].weights()).items()}
    for model in models:
        for weight in model.weights():
            filled = torch.zeros(weight.parameter.shape, dtype=torch.int32)
            for piece in weight.pieces:
                filled[piece.at] += 1
                counts[piece.source][piece.part] += 1
            assert not weight.pieces or (filled == 1).all(), "a rank's parameter is filled entirely, each element once"
    return counts
