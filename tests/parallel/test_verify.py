"""Compiled programs are proven on symbols, and every kind of fault that is planted in one is found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from tests.parallel.parts import decoder, mlp, moe
from tokenspeed.parallel.compiler import compile_model
from tokenspeed.parallel.mesh import Mesh
from tokenspeed.parallel.program import Program
from tokenspeed.parallel.steps import (
    Add,
    AllGather,
    AllReduce,
    AllReduceNorm,
    Combine,
    Copy,
    Dispatch,
    GatherFeatures,
    Norm,
    Planned,
    ReduceScatter,
    Run,
    Slice,
    Step,
)
from tokenspeed.parallel.verify import ProgramWrong, verify

MESHES = [
    Mesh.single(),
    Mesh.of(2),
    Mesh.of(8),
    Mesh.of(8, attn_dp=8, moe_ep=8),
    Mesh.of(8, attn_dp=8, moe_ep=8, dense_tp=8),
    Mesh.of(8, attn_tp=4, moe_ep=4, dense_tp=8, vocab_tp=8),
    Mesh.of(8, attn_tp=2, moe_ep=8, dense_tp=4, vocab_tp=1),
    Mesh.of(8, attn_tp=8, moe_ep=2, moe_tp=2, dense_tp=2),
    Mesh.of(12, attn_tp=6, moe_ep=4, moe_tp=3, dense_tp=3),
    Mesh.of(16, attn_dp=4, moe_ep=16, dense_tp=2),
    Mesh.of(2, attn_copies=2),
    Mesh.of(8, attn_copies=4, moe_ep=8),
    Mesh.of(16, attn_copies=2, attn_dp=2, moe_ep=16, dense_tp=4, vocab_tp=2),
]


@pytest.mark.parametrize("mesh", MESHES, ids=[f"mesh{i}" for i in range(len(MESHES))])
@pytest.mark.parametrize("tokens", [1, 64, 65_536])
def test_every_program_gives_each_module_what_it_declared(mesh: Mesh, tokens: int) -> None:
    for fan_out in (1, 64):
        root = decoder(mlp(), moe(fan_out=fan_out, shared=True), moe(fan_out=fan_out))
        verify(compile_model(root, mesh, "toy", tokens=tokens, rows=min(tokens, 16)))


def program(mesh: Mesh, tokens: int = 8, fan_out: int = 64) -> Program:
    root = decoder(mlp(), moe(fan_out=fan_out, shared=True), mlp())
    return compile_model(root, mesh, "toy", tokens=tokens)


def changed(made: Program, change: Callable[[list[Step]], list[Step]]) -> Program:
    return dataclasses.replace(made, steps=tuple(map(Planned, change([planned.step for planned in made.steps]))))


def found(made: Program, change: Callable[[list[Step]], list[Step]]) -> str:
    verify(made)
    with pytest.raises(ProgramWrong) as failure:
        verify(changed(made, change))
    return str(failure.value)


def without(kind: type, number: int = 0) -> Callable[[list[Step]], list[Step]]:
    def change(steps: list[Step]) -> list[Step]:
        index = [i for i, step in enumerate(steps) if isinstance(step, kind)][number]
        return steps[:index] + steps[index + 1 :]

    return change


def swapped(kind: type, make: Callable[..., list[Step]], number: int = 0) -> Callable[[list[Step]], list[Step]]:
    def change(steps: list[Step]) -> list[Step]:
        index = [i for i, step in enumerate(steps) if isinstance(step, kind)][number]
        return steps[:index] + make(steps[index]) + steps[index + 1 :]

    return change


TENSOR_PARALLEL = Mesh.of(8)
DATA_PARALLEL = Mesh.of(8, attn_dp=8, moe_ep=8, dense_tp=8)
MIXED = Mesh.of(8, attn_tp=4, moe_ep=4, dense_tp=8)
PROMPT = 65_536


@pytest.mark.parametrize("number", range(7))
def test_a_reduction_that_is_missing_is_found_wherever_it_is(number: int) -> None:
    said = found(program(TENSOR_PARALLEL), swapped(AllReduceNorm, lambda step: [Norm(step.module)], number))
    assert "is missing" in said and "rank 0, token 0 of x" in said


def test_a_reduction_that_is_done_twice_is_found() -> None:
    said = found(
        program(TENSOR_PARALLEL), swapped(AllReduceNorm, lambda step: [AllReduce("x", step.first, step.stop), step], 1)
    )
    assert "is too much" in said


def test_a_reduction_over_the_wrong_ranks_is_found() -> None:
    narrow = swapped(AllReduceNorm, lambda step: [AllReduceNorm(step.module, step.first + 1, step.stop)], 1)
    assert "is missing" in found(program(MIXED), narrow)
    wide = swapped(AllReduceNorm, lambda step: [AllReduceNorm(step.module, 0, step.stop)])
    assert "a term of" in found(program(MIXED), wide)


COPIED = Mesh.of(8, attn_copies=2, moe_ep=8)


def test_a_sum_over_copies_counts_twice_and_is_found() -> None:
    over_all = swapped(AllReduceNorm, lambda step: [AllReduceNorm(step.module, 0, step.stop)], 1)
    said = found(program(COPIED), over_all)
    assert "rank 0, token 0 of x: a term of toy.layers.0.attention is too much" in said


def test_a_copy_that_sees_fewer_tokens_is_found() -> None:
    def own_half(step: AllReduceNorm) -> list[Step]:
        return [step, Slice("x", 0, 1)]

    assert "rank 0 has 4 rows of x, not 8" in found(program(COPIED), swapped(AllReduceNorm, own_half))


def test_a_copy_that_was_left_without_another_ones_terms_is_found() -> None:
    # Experts are spread over the copies, so what comes into the next attention is a sum over all of them.
    narrow = swapped(AllReduceNorm, lambda step: [AllReduceNorm(step.module, step.first + 1, step.stop)], 2)
    said = found(program(COPIED), narrow)
    assert "toy.layers.1.norm1" in said and "a term of toy.layers.0.mlp is missing" in said


def test_a_gather_that_is_missing_or_done_twice_is_found() -> None:
    for made in (program(DATA_PARALLEL), program(TENSOR_PARALLEL, PROMPT)):
        assert "rows of x" in found(made, without(AllGather))
        assert "rows of x" in found(made, swapped(AllGather, lambda step: [step, step]))


def test_parts_that_are_kept_without_being_summed_are_found() -> None:
    made = program(TENSOR_PARALLEL, PROMPT)
    scatter = swapped(ReduceScatter, lambda step: [Slice("x", step.first, step.stop)], 1)
    assert "is missing" in found(made, scatter)
    whole = swapped(ReduceScatter, lambda step: [AllReduce("x", step.first, step.stop)], 1)
    assert "of residual" in found(made, whole)


def test_a_slice_of_the_wrong_atom_is_found() -> None:
    made = program(MIXED)
    assert "rank 2, token" in found(made, swapped(Slice, lambda step: [Slice("x", step.first + 1, step.stop + 1)]))
    assert "rows of residual, not 8" in found(made, without(Slice))


def test_a_residual_that_stayed_behind_is_found() -> None:
    # The stream changes its layout where a layer with experts follows one without.
    mesh = Mesh.of(8, attn_tp=2, moe_ep=8)
    made = program(mesh, PROMPT, fan_out=2)
    moves = [planned.step for planned in made.steps if getattr(planned.step, "tensor", "") == "residual"]
    assert moves
    for move in moves:
        assert "residual" in found(made, lambda steps, move=move: [step for step in steps if step is not move])


def test_features_that_are_not_put_together_are_found() -> None:
    assert "blocks of features" in found(program(TENSOR_PARALLEL), without(GatherFeatures))


def test_tokens_that_are_not_sent_or_do_not_come_back_are_found() -> None:
    made = program(Mesh.of(8, attn_dp=8, moe_ep=8), 4096, fan_out=1)
    assert "rows of x" in found(made, without(Dispatch))
    assert "rank" in found(made, without(Combine))
    assert "runs where" in found(made, swapped(Run, lambda step: [], 5))


def test_what_is_beside_counts_once() -> None:
    made = program(DATA_PARALLEL)
    assert "a term of toy.layers.1.mlp.shared is missing" in found(made, without(Add))
    assert "there is no toy.layers.1.mlp.shared" in found(made, without(Copy))

    def twice(steps: list[Step]) -> list[Step]:
        index = next(i for i, step in enumerate(steps) if isinstance(step, Add))
        shared = "toy.layers.1.mlp.shared"
        copied = [step for step in steps[:index] if step != Copy(shared)]
        run = copied.index(Run(shared, shared))
        # Fed with what the experts gave instead of what they took.
        return [*copied[:run], Copy(shared), *copied[run:], *steps[index:]]

    assert "of toy.layers.1.mlp.shared" in found(made, twice)


def test_modules_run_in_their_order_each_once() -> None:
    made = program(Mesh.single())
    assert "never ran" in found(made, without(Run, -1))
    assert "runs where" in found(made, without(Norm, 1))
    assert "runs where" in found(made, swapped(Run, lambda step: [step, step], 1))
