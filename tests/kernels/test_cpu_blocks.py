"""Whole blocks on the CPU: the bits of their parts, alone as among others, and nothing written when a row is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokenspeed.kernels.numerics.block_cases import gqa_block_arguments, mlp_block_arguments, stack_arguments
from tokenspeed.kernels.numerics.case import Arguments, copied
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Kernel, Target, TraitValue
from tokenspeed.kernels.selection import default

CPU = torch.device("cpu")
TARGET = Target(Platform.of(CPU), torch.float32)
GQA: dict[str, TraitValue] = {
    "hidden_size": 96, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "block_size": 16, "interleaved": False,
    "qkv_form": "q4_1", "out_form": "q8_0",
}  # fmt: skip
MLP: dict[str, TraitValue] = {
    "hidden_size": 96, "intermediate_size": 160, "gate_up_form": "q4_1", "down_form": "q4_1"
}  # fmt: skip


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def kernel(op: str, traits: dict[str, TraitValue]) -> Kernel:
    return default().select(op, TARGET, traits)


def composed(op: str, traits: dict[str, TraitValue]) -> Kernel:
    (parts,) = (each for each in default().registry.of(op) if each.backend == "composed")
    return parts.bind(TARGET, traits)


def attention(generator: torch.Generator, lengths: tuple[int, ...]) -> Arguments:
    return gqa_block_arguments(lengths, GQA, True, True, "residual", generator, torch.float32)


def one_row(arguments: Arguments, row: int) -> Arguments:
    x, edge, weights, eps, k, v, rows, scale = arguments
    at = slice(row, row + 1)
    places = rows._replace(**{name: getattr(rows, name)[at] for name in rows._fields})
    return x[at], edge._replace(residual=edge.residual[at]), weights, eps, k.clone(), v.clone(), places, scale


def test_an_attention_block_has_the_bits_of_its_parts(generator: torch.Generator) -> None:
    arguments = attention(generator, (70, 1, 300))
    ours, theirs = copied(arguments, CPU), copied(arguments, CPU)
    got, wanted = kernel("gqa_block_decode", GQA)(*ours), composed("gqa_block_decode", GQA)(*theirs)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    stored = arguments[6].kv_slots
    assert torch.equal(ours[4].flatten(0, 1)[stored], theirs[4].flatten(0, 1)[stored])


def test_a_feed_forward_block_has_the_bits_of_its_parts(generator: torch.Generator) -> None:
    arguments = mlp_block_arguments(7, MLP, True, "residual", generator, torch.float32)
    got, wanted = kernel("mlp_block_decode", MLP)(*arguments), composed("mlp_block_decode", MLP)(*arguments)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


def test_a_row_of_a_block_has_the_same_bits_alone(generator: torch.Generator) -> None:
    arguments = attention(generator, (70, 1, 300, 17, 5))
    alone = [kernel("gqa_block_decode", GQA)(*one_row(arguments, row))[0] for row in range(5)]
    assert torch.equal(torch.cat(alone), kernel("gqa_block_decode", GQA)(*copied(arguments, CPU))[0])


def test_other_weights_and_caches_take_the_place_of_those_before(generator: torch.Generator) -> None:
    block, fresh = kernel("gqa_block_decode", GQA), attention(generator, (9, 20))
    block(*attention(generator, (33, 2)))
    assert torch.equal(block(*copied(fresh, CPU))[0], kernel("gqa_block_decode", GQA)(*copied(fresh, CPU))[0])


@pytest.mark.parametrize("field", ["positions", "kv_slots", "kv_len", "block_table"])
def test_a_row_that_is_out_of_range_writes_nothing(field: str, generator: torch.Generator) -> None:
    arguments = attention(generator, (70, 40, 30))
    wrong: Tensor = getattr(arguments[6], field)
    wrong.view(3, -1)[1, 0] = 1_000_000
    before = arguments[4].clone(), arguments[5].clone()
    with pytest.raises(IndexError, match="row 1"):
        kernel("gqa_block_decode", GQA)(*arguments)
    for cache, was in zip(arguments[4:6], before, strict=True):
        assert torch.equal(cache.view(torch.int32), was.view(torch.int32))


def test_weights_of_another_form_than_the_block_was_chosen_for_are_refused(generator: torch.Generator) -> None:
    plain = mlp_block_arguments(2, {**MLP, "down_form": "rows"}, True, "residual", generator, torch.float32)
    with pytest.raises(ValueError, match="down is of the form rows; expected q4_1"):
        kernel("mlp_block_decode", MLP)(*plain)


STACK: dict[str, TraitValue] = {
    **{name: each for name, each in GQA.items() if not name.endswith("_form")}, "intermediate_size": 160
}  # fmt: skip


def stacked(generator: torch.Generator, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Arguments:
    return stack_arguments(lengths, ("q4_1", "rows", "q8_0"), STACK, True, True, generator, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lengths", [(40,), (70, 1, 300), (5, 9) * 8], ids=["1 row", "3 rows", "16 rows"])
def test_a_stack_has_the_bits_of_its_blocks(
    lengths: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    target = Target(TARGET.platform, dtype)
    (parts,) = (each for each in default().registry.of("stack_decode") if each.backend == "composed")
    arguments = stacked(generator, lengths, dtype)
    ours, theirs = copied(arguments, CPU), copied(arguments, CPU)
    got = default().select("stack_decode", target, STACK)(*ours)
    assert torch.equal(got, parts.bind(target, STACK)(*theirs))
    stored = arguments[3].kv_slots
    for mine, right in zip(ours[2], theirs[2], strict=True):
        for cache, wanted in zip(mine, right, strict=True):
            assert torch.equal(cache.flatten(0, 1)[stored], wanted.flatten(0, 1)[stored])


def test_a_stack_sees_a_cache_that_took_the_place_of_another(generator: torch.Generator) -> None:
    stack = kernel("stack_decode", STACK)
    x, layers, caches, *rest = stacked(generator, (33, 2))
    listed = list(caches)
    first = stack(x, layers, listed, *rest)
    listed[1] = copied(caches[1], CPU)
    listed[1][0].mul_(2)
    assert not torch.equal(stack(x, layers, listed, *rest), first)


@pytest.mark.parametrize("field", ["positions", "kv_slots", "kv_len", "block_table"])
def test_a_row_of_a_stack_that_is_out_of_range_writes_nothing(field: str, generator: torch.Generator) -> None:
    arguments = stacked(generator, (70, 40, 30))
    wrong: Tensor = getattr(arguments[3], field)
    wrong.view(3, -1)[1, 0] = 1_000_000
    before = copied(arguments[2], CPU)
    with pytest.raises(IndexError, match="row 1"):
        kernel("stack_decode", STACK)(*arguments)
    for layer, was in zip(arguments[2], before, strict=True):
        assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(layer, was, strict=True))


def test_layers_of_other_sizes_than_a_stack_was_chosen_for_are_refused(generator: torch.Generator) -> None:
    x, layers, caches, *rest = stacked(generator, (9,))
    narrow = layers[2]._replace(mlp_gain=layers[2].mlp_gain[:64].clone())
    with pytest.raises(ValueError, match="the gain before the feed-forward"):
        kernel("stack_decode", STACK)(x, (*layers[:2], narrow), caches, *rest)
    with pytest.raises(ValueError, match="3 layers have 4 caches"):
        kernel("stack_decode", STACK)(x, layers, caches[:2], *rest)
    short = tuple(cache[:-1] for cache in caches[1])
    with pytest.raises(ValueError, match="blocks, that of the first layer"):
        kernel("stack_decode", STACK)(x, layers, (caches[0], short, caches[2]), *rest)
