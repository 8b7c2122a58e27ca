"""The compiled form of a model: straight-line steps that every rank takes, and what they are expected to cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from tokenspeed.parallel.chain import Block, Chain
from tokenspeed.parallel.cost import Hardware, local_rows
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.steps import AllReduceNorm, Norm, Planned, Transfer


@dataclass(frozen=True, slots=True)
class StepTime:
    """Predicted seconds of a step on the rank that has most to do, host and sampler left out."""

    modules: float
    norms: float
    transfers: float

    @property
    def total(self) -> float:
        return self.modules + self.norms + self.transfers


@dataclass(frozen=True, slots=True)
class Program:
    """`steps` bring x from what the runner hands in (`chain.takes`) to what it gets (`chain.gives`), for `tokens`
    tokens over all ranks, `rows` of which are sampled from; `captured`: no step of it waits for the host. Two programs
    of one model over one mesh differ in their transfers alone, never in what a rank holds of the weights.
    """

    mesh: Mesh
    chain: Chain
    tokens: int
    rows: int
    hardware: Hardware
    steps: tuple[Planned, ...]
    captured: bool = False

    def transfers(self) -> Iterator[Planned]:
        """The steps at which ranks meet."""
        return (planned for planned in self.steps if isinstance(planned.step, Transfer | AllReduceNorm))

    def timing(self, context: int) -> StepTime:
        """What the step takes when every sequence has `context` tokens in the KV cache already."""
        norms = math.fsum(planned.seconds for planned in self.steps if isinstance(planned.step, Norm))
        modules = math.fsum(self._module_seconds(block, context) for block in self._blocks())
        return StepTime(modules, norms, math.fsum(planned.seconds for planned in self.transfers()))

    def timing_alone(self, context: int) -> StepTime:
        """The same of a rank that computes its share by itself, every collective left out."""
        whole = self.timing(context)
        kept = math.fsum(planned.kept for planned in self.transfers())
        return StepTime(whole.modules, whole.norms + kept, 0.0)

    def _blocks(self) -> Iterator[Block]:
        for element in self.chain.elements:
            if isinstance(element, Block):
                yield element
                yield from element.beside

    def _module_seconds(self, block: Block, context: int) -> float:
        tokens = local_rows(self.rows if block.sampled_only else self.tokens, block.takes, self.mesh)
        sequences = local_rows(self.rows, block.takes, self.mesh)
        return self.hardware.work_seconds(block.module.work(tokens), tokens, min(sequences, tokens), context)
