"""Products of bfloat16 pairs, in vectors and in tiles: one order of sums, exact where it must be, no wild numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokenspeed.kernels import ops
from tokenspeed.kernels.cpu import _ops, packed_linear, packed_lm_head
from tokenspeed.kernels.forms import FORMS, PANELS, QUANTISED, Packed, unpack
from tokenspeed.kernels.numerics.case import worst_error
from tokenspeed.kernels.numerics.dense_cases import packed_weight
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Kernel

TARGET = ops.Target(Platform.of(torch.device("cpu")), torch.bfloat16)
PAIRS_FEW = 32  # tokens up to which quantised weights are not rounded
PACKED = FORMS[1:]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(params=["avx512_bf16", "amx"])
def isa(request: pytest.FixtureRequest) -> _ops.Isa:
    name: _ops.Isa = request.param
    if not _ops.supports(name):
        pytest.skip(f"no {name} here")
    return name


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def product(isa: _ops.Isa, form: str) -> Kernel:
    return packed_linear.bind(_ops.Kernels(isa, "bfloat16"), TARGET, {"matrix_form": form})


def logits(isa: _ops.Isa, form: str) -> Kernel:
    """The same product with results that nothing rounds: bfloat16 hides the order of a sum."""
    return packed_lm_head.bind(_ops.Kernels(isa, "bfloat16"), TARGET, {"matrix_form": form})


def same_bits(got: Tensor, wanted: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[got.element_size()]
    return torch.equal(got.view(kind), wanted.view(kind))


def numbers(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g).bfloat16()


@pytest.mark.parametrize("form", PACKED)
def test_a_token_of_few_has_the_same_bits_alone_and_in_any_batch(
    isa: _ops.Isa, form: str, generator: torch.Generator
) -> None:
    weight, x = packed_weight(form, 203, 1088, generator, torch.bfloat16), numbers(generator, PAIRS_FEW, 1088)
    for linear in (product(isa, form), logits(isa, form)):
        whole = linear(x, weight)
        for begin, end in ((0, 1), (1, 3), (3, 6), (6, 14), (14, 31)):
            assert same_bits(linear(x[begin:end], weight), whole[begin:end])


@pytest.mark.parametrize("form", PACKED)
def test_numbers_of_any_size_have_the_same_bits_alone_and_in_a_batch(
    isa: _ops.Isa, form: str, generator: torch.Generator
) -> None:
    # Down to denormal ones, and with sums that cancel: vectors and tiles must treat them alike.
    weight, x = packed_weight(form, 48, 576, generator, torch.bfloat16), numbers(generator, 16, 576)
    x = x.float().ldexp(torch.randint(-60, 12, x.shape, generator=generator)).bfloat16()
    x[12:] = (numbers(generator, 4, 576).double() * 2.0**-126).bfloat16()
    for linear in (product(isa, form), logits(isa, form)):
        whole = linear(x, weight)
        assert (whole[:12] != 0).any(1).all()
        for t in range(16):
            for many in (1, 2, 3):
                assert same_bits(linear(x[t : t + many], weight), whole[t : t + many])
    assert torch.full((4,), 1e-40).mul(1).ne(0).all(), "this thread computes with denormal numbers again"


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("tokens", [33, 35])
def test_the_last_few_of_many_tokens_have_the_bits_that_they_have_alone(
    isa: _ops.Isa, form: str, tokens: int, generator: torch.Generator
) -> None:
    # Rows so long that the last block of tokens has one to three.
    weight, x = packed_weight(form, 16, 16384, generator, torch.bfloat16), numbers(generator, tokens, 16384)
    linear = logits(isa, form)
    whole = linear(x, weight)
    for t in (0, 31, 32, tokens - 1):
        assert same_bits(linear(x[t : t + 1], weight), whole[t : t + 1])


@pytest.mark.parametrize("form", PACKED)
def test_a_token_of_many_has_the_same_bits_in_any_chunk(isa: _ops.Isa, form: str, generator: torch.Generator) -> None:
    # Long rows, so that both the tokens and the columns are cut.
    weight, x = packed_weight(form, 83, 3008, generator, torch.bfloat16), numbers(generator, 600, 3008)
    linear = product(isa, form)
    whole = linear(x, weight)
    for begin, end in ((0, 33), (33, 100), (100, 373), (373, 600)):
        assert torch.equal(linear(x[begin:end], weight), whole[begin:end])


def test_plain_numbers_have_one_order_for_few_and_many(isa: _ops.Isa, generator: torch.Generator) -> None:
    weight, x = packed_weight(PANELS, 83, 1088, generator, torch.bfloat16), numbers(generator, 300, 1088)
    linear = product(isa, PANELS)
    whole = linear(x, weight)
    for begin, end in ((0, 1), (1, 4), (4, 23), (23, 300)):
        assert torch.equal(linear(x[begin:end], weight), whole[begin:end])


@pytest.mark.parametrize("form", QUANTISED)
@pytest.mark.parametrize("tokens", [1, 3, PAIRS_FEW])
def test_quantised_weights_of_few_tokens_are_the_numbers_of_the_file(
    isa: _ops.Isa, form: str, tokens: int, generator: torch.Generator
) -> None:
    weight, x = packed_weight(form, 40, 576, generator, torch.bfloat16), numbers(generator, tokens, 576)
    wanted = x.double() @ unpack(weight, torch.float64).T
    bind = packed_lm_head.bind(_ops.Kernels(isa, "bfloat16"), TARGET, {"matrix_form": form})
    assert worst_error(bind(x, weight), wanted) < 1e-6
    assert torch.equal(product(isa, form)(x, weight), bind(x, weight).bfloat16())


@pytest.mark.parametrize("form", QUANTISED)
def test_logits_of_many_tokens_are_as_exact_as_those_of_few(
    isa: _ops.Isa, form: str, generator: torch.Generator
) -> None:
    weight, x = packed_weight(form, 40, 576, generator, torch.bfloat16), numbers(generator, 70, 576)
    head = packed_lm_head.bind(_ops.Kernels(isa, "bfloat16"), TARGET, {"matrix_form": form})
    assert worst_error(head(x, weight), x.double() @ unpack(weight, torch.float64).T) < 1e-6


@pytest.mark.parametrize("form", [PANELS, "q4_1", "q8_0"])
@pytest.mark.parametrize("tokens", [1, 30, 300])
def test_the_number_of_threads_changes_no_bit(
    isa: _ops.Isa, form: str, tokens: int, generator: torch.Generator, restored_threads: None
) -> None:
    weight, x = packed_weight(form, 1203, 576, generator, torch.bfloat16), numbers(generator, tokens, 576)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(product(isa, form)(x, weight))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("tokens", [1, 6, 47])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token_or_its_output(
    isa: _ops.Isa, tokens: int, bad: float, generator: torch.Generator
) -> None:
    rows, columns = 50, 75
    x, weight = numbers(generator, tokens, columns), packed_weight(PANELS, rows, columns, generator, torch.bfloat16)
    x[tokens - 1, columns - 1] = bad
    weight.data[rows // 16, 0, 3, rows % 16 - 1] = bad  # the last row
    wrong = ~product(isa, PANELS)(x, weight).isfinite()
    assert wrong[tokens - 1].all() and wrong[:, rows - 1].all()
    assert not wrong[: tokens - 1, : rows - 1].any()


def test_a_product_without_columns_is_its_bias(isa: _ops.Isa) -> None:
    for rows in (5, 80):
        panels = (rows + 15) // 16
        nothing = Packed(torch.empty(panels, 0, 16, 16, 2, dtype=torch.bfloat16), PANELS, rows, 0)
        bias = torch.arange(float(rows)).bfloat16()
        for tokens in (2, 100):
            x = torch.empty(tokens, 0, dtype=torch.bfloat16)
            assert torch.equal(product(isa, PANELS)(x, nothing, bias), bias.expand(tokens, rows))
