"""Packed weights: nothing is lost, and a product with them has one order of sums whatever is beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tokenspeed.kernels import ops
from tokenspeed.kernels.forms import (
    FORMS,
    QUANTISED,
    ROWS,
    Packed,
    Rows,
    common_form,
    pack,
    pack_quantised,
    packed_shape,
    put_rows,
    rounded,
    unpack,
)
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


def some_rows(form: str, rows: int, columns: int, generator: torch.Generator) -> Rows:
    """All values that the form has, and scales and minimums of few bits."""
    kind = QUANTISED[form]
    low, high = (-128, 128) if kind.bits == 8 else (0, 1 << kind.bits)
    values = torch.randint(low, high, (rows, columns), generator=generator)
    scales = torch.randn(rows, columns // 32 * kind.spans, generator=generator).half().float()
    minimums = torch.randn(scales.shape, generator=generator).half().float() if kind.minimums else None
    return Rows(form, values.to(torch.int8 if kind.bits == 8 else torch.uint8), scales, minimums)


def meant(rows: Rows) -> torch.Tensor:
    kind = QUANTISED[rows.form]
    scales, minimums = (None if x is None else x.float().repeat_interleave(32 // kind.spans, 1) for x in rows[2:])
    weights = (rows.values.int() - kind.zero) * scales
    return weights if minimums is None else weights + minimums


@pytest.mark.parametrize("form", QUANTISED)
def test_a_weight_is_value_times_scale_plus_minimum(form: str, generator: torch.Generator) -> None:
    rows = some_rows(form, 35, 96, generator)
    packed = pack_quantised(rows)
    assert torch.equal(unpack(packed, torch.float32), meant(rows))
    assert (packed.data.shape, packed.data.dtype) == packed_shape(form, 35, 96, torch.float32)


@pytest.mark.parametrize("form", QUANTISED)
def test_rows_are_put_where_they_belong_and_the_others_stay(form: str, generator: torch.Generator) -> None:
    old, new = some_rows(form, 40, 96, generator), some_rows(form, 23, 96, generator)
    packed, wanted = pack_quantised(old), meant(old)
    put_rows(packed.data, 13, new.window(0, 22, slice(0, 96)))
    wanted[13:35] = meant(new)[:22]
    assert torch.equal(unpack(packed, torch.float32), wanted)


@pytest.mark.parametrize("form", QUANTISED)
def test_a_window_of_rows_is_that_of_their_weights(form: str, generator: torch.Generator) -> None:
    rows = some_rows(form, 9, 128, generator)
    assert torch.equal(meant(rows.window(2, 7, slice(32, 96))), meant(rows)[2:7, 32:96])


@pytest.mark.parametrize("form", [form for form, kind in QUANTISED.items() if kind.bits < 8])
def test_every_form_of_few_bits_has_the_same_weights_beside_others(form: str, generator: torch.Generator) -> None:
    rows = some_rows(form, 35, 96, generator)
    alone, beside = (unpack(pack_quantised(each), torch.float64) for each in (rows, rows.as_mixed()))
    assert torch.equal(alone, beside)


def test_the_form_of_pieces_is_what_holds_all_of_them() -> None:
    assert common_form({"q8_0"}) == "q8_0" and common_form({"q4_k", "q6_k", "q5_0"}) == "mixed"
    assert {common_form(forms) for forms in ((), {ROWS}, {ROWS, "q4_0"}, {"q8_0", "q4_0"})} == {ROWS}


@pytest.mark.parametrize("columns", [64, 70])
@pytest.mark.parametrize("size", [1e-9, 1e-6, 0.02, 100.0])
def test_eight_bits_are_the_nearest(columns: int, size: float, generator: torch.Generator) -> None:
    numbers = torch.randn(33, columns, generator=generator) * size
    rows = rounded(numbers)
    assert rows.values.shape == (33, -(-columns // 32) * 32) and rows.values.abs().max() <= 127
    wide = rows.scales.float().repeat_interleave(32, 1)[:, :columns]
    off = (meant(rows)[:, :columns] - numbers).abs()
    assert bool((off <= wide * 0.5001).all()) and bool((rows.scales.float() <= numbers.abs().max() / 126 + 6e-8).all())


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf, 1e7])
def test_a_number_that_eight_bits_cannot_hold_shows_in_its_scale(number: float) -> None:
    numbers = torch.ones(3, 64)
    numbers[1, 40] = number
    assert rounded(numbers).scales.isfinite().tolist() == [[True, True], [True, False], [True, True]]


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
