"""Packed weights: nothing is lost, and a product with them has one order of sums whatever is beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tokenspeed.kernels import ops
from tokenspeed.kernels.forms import FORMS, QUANTISED, Packed, pack, pack_quantised, packed_shape, unpack
from tokenspeed.kernels.numerics.dense_cases import packed_weight
from tokenspeed.kernels.platform import Platform

TARGET = ops.Target(Platform.of(torch.device("cpu")), torch.float32)
PACKED = FORMS[1:]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(16, 32), (1, 1), (33, 70)])
def test_packed_numbers_are_the_numbers(
    dtype: torch.dtype, rows: int, columns: int, generator: torch.Generator
) -> None:
    numbers = torch.randn(rows, columns, generator=generator).to(dtype)
    assert torch.equal(unpack(pack(numbers), dtype), numbers)


@pytest.mark.parametrize("form", QUANTISED)
def test_a_weight_is_value_times_scale_plus_minimum(form: str, generator: torch.Generator) -> None:
    kind = QUANTISED[form]
    signed = kind.bits == 8
    values = torch.randint(-128 if signed else 0, 128 if signed else 16, (35, 96), generator=generator)
    scales = torch.randn(35, 3, generator=generator).half().float()
    minimums = torch.randn(35, 3, generator=generator).half().float() if kind.minimums else None
    packed = pack_quantised(form, values.to(torch.int8 if signed else torch.uint8), scales, minimums)
    wanted = (values - kind.zero) * scales.repeat_interleave(32, 1)
    wanted = wanted if minimums is None else wanted + minimums.repeat_interleave(32, 1)
    assert torch.equal(unpack(packed, torch.float32), wanted)
    assert (packed.data.shape, packed.data.dtype) == packed_shape(form, 35, 96, torch.float32)


@pytest.mark.parametrize("form", PACKED)
def test_a_token_has_the_same_bits_alone_in_any_batch_and_in_any_chunk(form: str, generator: torch.Generator) -> None:
    weight = packed_weight(form, 203, 1088, generator, torch.float32)
    x, linear = torch.randn(300, 1088, generator=generator), ops.packed_linear(TARGET, matrix_form=form)
    whole = linear(x, weight)
    for begin, end in ((0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 47), (47, 300)):
        assert torch.equal(linear(x[begin:end], weight), whole[begin:end])


@pytest.mark.parametrize("form", PACKED)
def test_a_packed_product_is_that_of_the_numbers_it_stands_for(form: str, generator: torch.Generator) -> None:
    weight = packed_weight(form, 50, 96, generator, torch.float32)
    x, plain = torch.randn(7, 96, generator=generator), pack(unpack(weight, torch.float32))
    product, of_plain = (ops.packed_linear(TARGET, matrix_form=name) for name in (form, "panels"))
    assert torch.equal(product(x, weight), of_plain(x, plain))


@pytest.mark.parametrize("tokens", [1, 4, 60])
def test_the_number_of_threads_changes_no_bit_of_a_packed_product(
    tokens: int, generator: torch.Generator, restored_threads: None
) -> None:
    weight = packed_weight("q4_1", 1203, 576, generator, torch.float32)
    x, results = torch.randn(tokens, 576, generator=generator), []
    for threads in (1, 2, 3, 40, 1000):
        torch.set_num_threads(threads)
        results.append(ops.packed_linear(TARGET, matrix_form="q4_1")(x, weight))
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_matrix_of_another_form_or_shape_is_an_error(generator: torch.Generator) -> None:
    weight = packed_weight("q4_1", 20, 64, generator, torch.float32)
    with pytest.raises(ValueError, match="q4_1; expected q8_0"):
        ops.packed_linear(TARGET, matrix_form="q8_0")(torch.ones(1, 64), weight)
    with pytest.raises(ValueError, match="weight"):
        ops.packed_linear(TARGET, matrix_form="q4_1")(torch.ones(1, 64), Packed(weight.data, "q4_1", 40, 64))
    with pytest.raises(ValueError, match="x is"):
        ops.packed_linear(TARGET, matrix_form="q4_1")(torch.ones(1, 32), weight)


@pytest.mark.parametrize("bad", [-1, 20])
def test_an_id_that_a_packed_table_does_not_have_is_an_error(bad: int, generator: torch.Generator) -> None:
    table = packed_weight("q8_0", 20, 64, generator, torch.float32)
    with pytest.raises(IndexError, match="id 1"):
        ops.packed_embedding(TARGET, matrix_form="q8_0")(torch.tensor([3, bad]), table)


@pytest.mark.parametrize("form", PACKED)
def test_a_weight_of_another_form_is_refused_before_it_is_read(form: str, generator: torch.Generator) -> None:
    rows = torch.randn(3, 64, generator=generator)
    other = packed_weight("q4_1" if form != "q4_1" else "q8_0", 3, 64, generator, torch.float32)
    for wrong in (rows, other):
        for product in (ops.packed_linear, ops.packed_lm_head):
            with pytest.raises(ValueError, match=f"expected {form}"):
                product(TARGET, matrix_form=form)(rows, wrong)
        with pytest.raises(ValueError, match=f"expected {form}"):
            ops.packed_embedding(TARGET, matrix_form=form)(torch.zeros(1, dtype=torch.int64), wrong)
