"""Experts and their choice on the CPU: order of sums, padding, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokenspeed.kernels import ops
from tokenspeed.kernels.cpu.linear import BFLOAT16_FEATURES
from tokenspeed.kernels.numerics.case import Arguments, worst_error
from tokenspeed.kernels.numerics.moe_cases import moe_experts_arguments
from tokenspeed.kernels.numerics.suite import TOLERANCE
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.reference.moe_experts import moe_experts as reference

CPU = Platform.of(torch.device("cpu"))
WIDE = ops.Target(CPU, torch.float32)
HIDDEN, INNER, EXPERTS, SHARED = 100, 52, 5, 1


PLAIN = Platform(CPU.vendor, CPU.arch, CPU.isa - BFLOAT16_FEATURES)
"""This machine, as if it had no bfloat16 instructions: nothing is left to torch."""


@pytest.fixture(
    params=[(CPU, torch.float32), (CPU, torch.bfloat16), (PLAIN, torch.bfloat16)],
    ids=["float32", "bfloat16", "bfloat16 without instructions"],
)
def target(request: pytest.FixtureRequest) -> ops.Target:
    return ops.Target(*request.param)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def experts(target: ops.Target) -> ops.MoeExperts:
    sizes = {"num_experts": EXPERTS + SHARED, "hidden_size": HIDDEN, "intermediate_size": INNER}
    return ops.moe_experts(target, num_shared=SHARED, **sizes)


def drawn(tokens: int, target: ops.Target, padding: int = 0) -> Arguments:
    """Two of five experts and a shared one for each token."""
    g = torch.Generator().manual_seed(tokens)
    return moe_experts_arguments(tokens, HIDDEN, INNER, EXPERTS, 2, SHARED, padding, g, target.dtype)


def route(target: ops.Target = WIDE, **traits: int | str | bool) -> ops.MoeRoute:
    return ops.moe_route(target, **({"num_experts": 8, "top_k": 2} | traits))


def rows_of(arguments: Arguments, rows: slice) -> Arguments:
    x, gate_up, down, ids, weights = arguments
    return x[rows], gate_up, down, ids[rows], weights[rows]


@pytest.mark.parametrize("tokens", [2, 5, 31])
def test_a_token_among_few_has_the_same_bits_alone(tokens: int, target: ops.Target) -> None:
    arguments = drawn(tokens, target)
    alone = [experts(target)(*rows_of(arguments, slice(t, t + 1))) for t in range(tokens)]
    assert torch.equal(experts(target)(*arguments), torch.cat(alone))


@pytest.mark.parametrize("begin", [0, 77, 250])
def test_a_token_among_many_has_the_same_bits_in_any_chunk(begin: int, target: ops.Target) -> None:
    arguments, chunk = drawn(500, target), slice(begin, begin + 250)
    assert int(torch.bincount(arguments[3][chunk].flatten().long()).min()) > 32
    assert torch.equal(experts(target)(*rows_of(arguments, chunk)), experts(target)(*arguments)[chunk])


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 33, 70])
@pytest.mark.parametrize(("hidden", "inner"), [(33, 17), (600, 270), (1100, 8)])
def test_experts_of_any_width_agree_with_the_reference(
    hidden: int, inner: int, tokens: int, target: ops.Target
) -> None:
    g = torch.Generator().manual_seed(tokens)
    x, gate_up, down, ids, weights = moe_experts_arguments(tokens, hidden, inner, 2, 2, 0, 0, g, target.dtype)
    wanted = reference(x.double(), gate_up.double(), down.double(), ids, weights)
    got = ops.moe_experts(target, num_experts=2, hidden_size=hidden, intermediate_size=inner, num_shared=0)
    assert worst_error(got(x, gate_up, down, ids, weights), wanted) < TOLERANCE[target.dtype]


@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_the_number_of_threads_changes_no_bit(tokens: int, target: ops.Target, restored_threads: None) -> None:
    arguments, results = drawn(tokens, target, padding=tokens // 3), []
    for threads in (1, 2, 5, 40):
        torch.set_num_threads(threads)
        results.append(experts(target)(*arguments))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_more_pairs_than_are_held_at_once_are_summed(target: ops.Target) -> None:
    x, gate_up, down, ids, weights = drawn(700, target, padding=3)
    wanted = reference(x.double(), gate_up.double(), down.double(), ids, weights)
    got = experts(target)(x, gate_up, down, ids, weights)
    assert worst_error(got[:697], wanted[:697]) < TOLERANCE[target.dtype]
    assert not got[697:].any()


@pytest.mark.parametrize("tokens", [3, 200])
def test_experts_and_tokens_that_nobody_names_are_not_read(tokens: int) -> None:
    x, gate_up, down, ids, weights = drawn(tokens, WIDE, padding=2)
    ids[ids == 3] = -1
    right = experts(WIDE)(x, gate_up, down, ids, weights)
    gate_up[3], down[3], x[tokens - 2 :], weights[tokens - 2 :] = torch.nan, torch.nan, torch.nan, torch.nan
    assert torch.equal(experts(WIDE)(x, gate_up, down, ids, weights), right)


def test_a_token_of_which_nothing_is_finite_spoils_no_other() -> None:
    arguments = drawn(40, WIDE)
    arguments[0][7] = torch.nan
    wrong = ~experts(WIDE)(*arguments).isfinite()
    assert wrong[7].all() and not wrong[:7].any() and not wrong[8:].any()


@pytest.mark.parametrize("tokens", [4, 100])
@pytest.mark.parametrize("bad", [-2, EXPERTS + SHARED])
def test_an_expert_that_does_not_exist_is_an_error(bad: int, tokens: int, target: ops.Target) -> None:
    arguments = drawn(tokens, target)
    arguments[3][2, 1] = bad
    with pytest.raises(IndexError, match="token 2"):
        experts(target)(*arguments)


def test_no_tokens_or_no_experts_of_any_are_zeros() -> None:
    x, gate_up, down, ids, weights = drawn(3, WIDE)
    assert experts(WIDE)(x[:0], gate_up, down, ids[:0], weights[:0]).shape == (0, HIDDEN)
    assert torch.equal(experts(WIDE)(x, gate_up, down, ids.fill_(-1), weights), torch.zeros(3, HIDDEN))
    ids, weights = route()(torch.empty(0, 8), None, 1.0)
    assert ids.shape == weights.shape == (0, 2)


def test_wrong_types_and_shapes_are_errors() -> None:
    x, gate_up, down, ids, weights = drawn(3, WIDE)
    with pytest.raises(ValueError, match=r"ids is torch\.int64"):
        experts(WIDE)(x, gate_up, down, ids.long(), weights)
    with pytest.raises(ValueError, match="down"):
        experts(WIDE)(x, gate_up, down[:, 1:], ids, weights)
    with pytest.raises(ValueError, match="gate_up"):
        experts(WIDE)(x, gate_up.transpose(1, 2).contiguous().transpose(1, 2), down, ids, weights)
    with pytest.raises(ValueError, match="weights"):
        experts(WIDE)(x, gate_up, down, ids, weights[:, 1:])
    with pytest.raises(ValueError, match="logits"):
        route()(torch.ones(2, 8, dtype=torch.float64), None, 1.0)
    with pytest.raises(ValueError, match="bias"):
        route()(torch.ones(2, 8), torch.ones(7), 1.0)


def test_scores_in_float32_are_taken_as_they_are_in_any_type(target: ops.Target) -> None:
    logits = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)) * 1e-3
    ids, weights = route(target)(logits, None, 1.0)
    wanted = logits.double().softmax(1).topk(2)
    assert torch.equal(ids.long(), wanted.indices)
    assert worst_error(weights, wanted.values) < 1e-6


def chosen(choose: ops.MoeRoute, logits: Tensor, bias: Tensor | None = None) -> list[int]:
    return sorted(choose(logits[None], bias, 1.0)[0][0].tolist())


def test_of_equal_experts_and_groups_the_lowest_are_chosen() -> None:
    assert chosen(route(top_k=3), torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1])) == [1, 3, 5]
    grouped = route(top_k=3, num_groups=4, top_groups=2, scoring="sigmoid")
    assert chosen(grouped, torch.zeros(8)) == [0, 1, 2]
    # A group counts by its two best: the one with the best expert of all is out.
    assert chosen(grouped, torch.tensor([-9.0, 3, 2, 2, -1, 0, 2, 2])) == [2, 3, 6]


def test_a_correction_counts_for_the_choice_and_not_for_the_weight() -> None:
    logits = torch.zeros(1, 8)
    bias = torch.zeros(8).index_fill(0, torch.tensor([6]), 5.0)
    ids, weights = route(scoring="sigmoid")(logits, bias, 1.0)
    assert ids.tolist() == [[6, 0]] and weights.tolist() == [[0.5, 0.5]]


def test_logits_that_are_not_finite_give_such_weights_and_experts_that_exist() -> None:
    for scoring in ("softmax", "sigmoid"):
        ids, weights = route(scoring=scoring)(torch.full((1, 8), torch.nan), None, 1.0)
        assert weights.isnan().all() and ((ids >= 0) & (ids < 8)).all()


def test_groups_that_cannot_hold_the_chosen_are_refused() -> None:
    for traits in ({"top_k": 5, "num_groups": 4, "top_groups": 2}, {"num_groups": 3}, {"top_k": 9}):
        with pytest.raises(ops.KernelError, match="experts"):
            route(**traits)
