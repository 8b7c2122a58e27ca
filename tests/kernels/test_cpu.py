"""What the CPU kernels promise beyond their numbers: order of sums, layouts, and no wild reads or writes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tokenspeed.kernels import ops
from tokenspeed.kernels.cpu import _ops
from tokenspeed.kernels.cpu.linear import BFLOAT16_FEATURES
from tokenspeed.kernels.numerics.attention_cases import Paged
from tokenspeed.kernels.platform import Platform

ISAS: tuple[_ops.Isa, ...] = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
TARGET = ops.Target(Platform.of(torch.device("cpu")), torch.float32)
PAGED = Paged(rows=((1, 700), (1, 3), (1, 65)), heads=6, kv_heads=2, head_dim=64, block_size=16)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def decode() -> ops.MhaDecode:
    return ops.mha_decode(TARGET, num_heads=6, num_kv_heads=2, head_dim=64, block_size=16)


def prefill() -> ops.MhaPrefill:
    return ops.mha_prefill(TARGET, num_heads=6, num_kv_heads=2, head_dim=64, block_size=16)


def test_a_row_decodes_to_the_same_bits_alone_and_in_a_batch(generator: torch.Generator) -> None:
    q, k, v, table, kv_len, kv_lens, scale = PAGED.decode_arguments(generator, torch.float32)
    together = decode()(q, k, v, table, kv_len, kv_lens, scale)
    for row in range(3):
        one = slice(row, row + 1)
        alone = decode()(q[one], k, v, table[one], kv_len[one], kv_lens[one], scale)
        assert torch.equal(alone[0], together[row])


def test_the_number_of_threads_changes_no_bit(generator: torch.Generator, restored_threads: None) -> None:
    wide = Paged(rows=((300, 700), (1, 3), (65, 65)), heads=6, kv_heads=2, head_dim=64, block_size=16)
    arguments = wide.arguments(generator, torch.float32)
    decode_arguments = PAGED.decode_arguments(generator, torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append((prefill()(*arguments), decode()(*decode_arguments)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


VARIANTS = [pytest.param((isa, dtype), id=f"{isa}-{dtype}".replace("torch.", "")) for isa in ISAS
            for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
GROUPS = ((6, 2, 64, 16), (16, 1, 80, 48), (4, 4, 16, 64), (3, 3, 128, 32))


def bound(op: str, variant: tuple[_ops.Isa, torch.dtype], paged: Paged) -> Callable[..., Tensor]:
    """The op of one instruction set, whatever would be chosen."""
    isa, dtype = variant
    if not _ops.supports(isa):
        pytest.skip(f"no {isa} here")
    kernels = _ops.Kernels(isa, "float32" if dtype == torch.float32 else "bfloat16")
    launcher = importlib.import_module(f"tokenspeed.kernels.cpu.{op}")
    kernel: Callable[..., Tensor] = launcher.bind(kernels, ops.Target(TARGET.platform, dtype), paged.traits)
    return kernel


@pytest.mark.parametrize("shape", GROUPS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_and_chunks_give_the_same_bits_on_every_instruction_set(
    variant: tuple[_ops.Isa, torch.dtype], shape: tuple[int, int, int, int], generator: torch.Generator
) -> None:
    paged = Paged(((1, 270), (1, 3), (1, 65)), *shape)
    q, k, v, table, kv_len, kv_lens, scale = paged.decode_arguments(generator, variant[1])
    decode = bound("mha_decode", variant, paged)
    together = decode(q, k, v, table, kv_len, kv_lens, scale)
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(decode(q[one], k, v, table[one], kv_len[one], kv_lens[one], scale)[0], together[row])

    paged = Paged(((150, 270),), *shape)
    q, k, v, table, *_, scale = paged.arguments(generator, variant[1])
    prefill = bound("mha_prefill", variant, paged)

    def chunk(begin: int, end: int) -> Tensor:
        starts, length = torch.tensor([0, end - begin], dtype=torch.int32), torch.tensor([120 + end], dtype=torch.int32)
        return prefill(q[begin:end], k, v, table, starts, length, (end - begin,), (120 + end,), scale)

    whole = chunk(0, 150)
    for cut in (1, 8, 9, 137):
        assert torch.equal(torch.cat((chunk(0, cut), chunk(cut, 150))), whole)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_of_a_long_context_counts_less_for_being_far(variant: tuple[_ops.Isa, torch.dtype]) -> None:
    """Equal keys: the result is the mean of the values, however many tiles lie between."""
    length, block = 16384, 64
    k = torch.ones(length // block, block, 1, 64, dtype=variant[1])
    v = torch.zeros_like(k)
    v[: length // block // 2] = 1
    q, table = torch.ones(2, 2, 64, dtype=variant[1]), torch.arange(length // block, dtype=torch.int32)[None]
    starts, lengths = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    attend = bound("mha_prefill", variant, Paged(((2, length),), 2, 1, 64, block))
    assert (attend(q, k, v, table, starts, lengths, (2,), (length,), 0.125).float() - 0.5).abs().max() < 4e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_negative_scale_prefers_what_is_least_alike(
    variant: tuple[_ops.Isa, torch.dtype], generator: torch.Generator
) -> None:
    paged = Paged(((40, 200),), 6, 2, 64, 16)
    q, *rest, scale = paged.arguments(generator, variant[1])
    prefill = bound("mha_prefill", variant, paged)
    assert torch.equal(prefill(q, *rest, -scale), prefill(-q, *rest, scale))


@pytest.mark.parametrize("cut", [1, 5, 16, 63, 64, 130])
def test_a_prompt_in_chunks_gives_the_same_bits_as_whole(cut: int, generator: torch.Generator) -> None:
    whole = Paged(rows=((131, 131),), heads=6, kv_heads=2, head_dim=64, block_size=16)
    q, k, v, table, _, _, _, _, scale = whole.arguments(generator, torch.float32)

    def chunk(begin: int, end: int) -> torch.Tensor:
        starts, length = torch.tensor([0, end - begin], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        return prefill()(q[begin:end], k, v, table, starts, length, (end - begin,), (end,), scale)

    assert torch.equal(torch.cat((chunk(0, cut), chunk(cut, 131))), chunk(0, 131))


def product(dtype: torch.dtype) -> ops.Linear:
    return ops.linear(ops.Target(TARGET.platform, dtype))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def operands(request: pytest.FixtureRequest, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x [300, 1100], weight [203, 1100], bias."""
    shapes = ((300, 1100), (203, 1100), (203,))
    return tuple(torch.randn(shape, generator=generator).to(request.param) for shape in shapes)


@pytest.mark.parametrize("tokens", [2, 3, 4, 5, 7, 16, _ops.LINEAR_FEW])
def test_a_token_of_a_small_product_has_the_same_bits_alone(
    tokens: int, operands: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, bias = operands
    linear = product(x.dtype)
    alone = torch.cat([linear(x[t : t + 1], weight, bias) for t in range(tokens)])
    assert torch.equal(linear(x[:tokens], weight, bias), alone)


def ours(x: Tensor) -> None:
    """Skip what `linear` leaves to torch, which promises no bits."""
    if x.dtype is torch.bfloat16 and not TARGET.platform.isa.isdisjoint(BFLOAT16_FEATURES):
        pytest.skip("many bfloat16 tokens are torch's here")


@pytest.mark.parametrize("begin", [0, 5, 123])
def test_a_token_of_a_large_product_has_the_same_bits_in_any_chunk(
    begin: int, operands: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, bias = operands
    ours(x)
    linear = product(x.dtype)
    chunk = linear(x[begin : begin + _ops.LINEAR_FEW + 1], weight, bias)
    assert torch.equal(chunk, linear(x, weight, bias)[begin : begin + _ops.LINEAR_FEW + 1])


@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_the_number_of_threads_changes_no_bit_of_a_product(
    tokens: int, operands: tuple[Tensor, Tensor, Tensor], restored_threads: None
) -> None:
    x, weight, bias = operands
    if tokens > _ops.LINEAR_FEW:
        ours(x)
    results = []
    for threads in (1, 2, 3, 7, 40):
        torch.set_num_threads(threads)
        results.append(product(x.dtype)(x[:tokens], weight, bias))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("tokens", [1, 6, 100])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_token_or_its_output(
    tokens: int, bad: float, operands: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, _ = operands
    x, weight = x[:tokens].clone(), weight.clone()
    x[tokens - 1, 1099], weight[202, 3] = bad, bad
    wrong = ~product(x.dtype)(x, weight).isfinite()
    assert wrong[tokens - 1].all() and wrong[:, 202].all()
    assert not wrong[: tokens - 1, :202].any()


def test_a_product_with_nothing_in_it_is_its_bias() -> None:
    linear = product(torch.float32)
    assert linear(torch.empty(0, 8), torch.ones(4, 8)).shape == (0, 4)
    assert linear(torch.ones(2, 8), torch.empty(0, 8)).shape == (2, 0)
    for tokens in (2, 100):
        result = linear(torch.empty(tokens, 0), torch.empty(4, 0), torch.arange(4.0))
        assert torch.equal(result, torch.arange(4.0).expand(tokens, 4))


def test_the_shapes_of_a_product_must_fit() -> None:
    linear = product(torch.float32)
    with pytest.raises(ValueError, match="weight"):
        linear(torch.ones(2, 8), torch.ones(4, 7))
    with pytest.raises(ValueError, match="bias"):
        linear(torch.ones(2, 8), torch.ones(4, 8), torch.ones(3))
    with pytest.raises(ValueError, match=r"x is torch\.bfloat16"):
        linear(torch.ones(2, 8).bfloat16(), torch.ones(4, 8))


def test_callers_at_the_same_time_get_what_one_gets(
    operands: tuple[Tensor, Tensor, Tensor], restored_threads: None
) -> None:
    x, weight, bias = operands
    linear = product(x.dtype)
    torch.set_num_threads(5)
    expected = {tokens: linear(x[:tokens], weight, bias) for tokens in (1, 4, 40)}

    def repeat(tokens: int) -> bool:
        torch.set_num_threads(5)
        return all(torch.equal(linear(x[:tokens], weight, bias), expected[tokens]) for _ in range(100))

    with ThreadPoolExecutor(3) as callers:
        assert all(callers.map(repeat, expected))


@pytest.mark.parametrize("bad", [-1, 1_000_000])
def test_a_block_that_does_not_exist_is_an_error(bad: int, generator: torch.Generator) -> None:
    q, k, v, table, kv_len, kv_lens, scale = PAGED.decode_arguments(generator, torch.float32)
    table[2, 4] = bad
    with pytest.raises(IndexError, match="row 2"):
        decode()(q, k, v, table, kv_len, kv_lens, scale)


@pytest.mark.parametrize("length", [-3, 2_000_000_000])
def test_a_length_that_the_table_cannot_hold_is_an_error(length: int, generator: torch.Generator) -> None:
    q, k, v, table, kv_len, kv_lens, scale = PAGED.decode_arguments(generator, torch.float32)
    kv_len[1] = length
    with pytest.raises(IndexError, match="row 1"):
        decode()(q, k, v, table, kv_len, kv_lens, scale)


def test_a_row_without_tokens_gives_zeros_and_leaves_its_neighbours_alone(generator: torch.Generator) -> None:
    q, k, v, table, kv_len, kv_lens, scale = PAGED.decode_arguments(generator, torch.float32)
    whole = decode()(q, k, v, table, kv_len, kv_lens, scale)
    kv_len[1] = 0
    table[1] = -1
    out = decode()(q, k, v, table, kv_len, kv_lens, scale)
    assert not out[1].any() and torch.equal(out[::2], whole[::2])


def test_a_table_that_is_a_slice_is_not_read_past_its_columns(generator: torch.Generator) -> None:
    q, k, v, table, kv_len, kv_lens, scale = PAGED.decode_arguments(generator, torch.float32)
    wide = torch.zeros(3, table.shape[1] + 8, dtype=torch.int32)
    sliced = wide[:, 8:]
    sliced.copy_(table)
    assert torch.equal(
        decode()(q, k, v, sliced, kv_len, kv_lens, scale), decode()(q, k, v, table, kv_len, kv_lens, scale)
    )
    with pytest.raises(IndexError, match="row 0"):
        decode()(q, k, v, sliced[:, :5], kv_len, kv_lens, scale)


def test_more_new_tokens_than_the_row_has_are_an_error(generator: torch.Generator) -> None:
    arguments = list(Paged(((5, 9), (4, 8)), 6, 2, 64, 16).arguments(generator, torch.float32))
    arguments[5] = torch.tensor([9, 3], dtype=torch.int32)
    with pytest.raises(IndexError, match="row 1"):
        prefill()(*arguments)


@pytest.mark.parametrize("slot", [-2, 64])
def test_a_slot_outside_the_cache_is_an_error_and_writes_nothing(slot: int) -> None:
    cache = torch.zeros(4, 16, 2, 8)
    with pytest.raises(IndexError, match="token 1"):
        ops.kv_store(TARGET)((torch.ones(3, 2, 8),), (cache,), torch.tensor([0, slot, 2]))
    assert not cache.any()


@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_past_the_table_is_an_error(position: int) -> None:
    q, k = torch.ones(2, 2, 8), torch.ones(2, 1, 8)
    with pytest.raises(IndexError, match="token 1"):
        ops.rotary(TARGET, head_dim=8)(q, k, torch.tensor([0, position]), torch.ones(10, 8))
    assert torch.equal(q, torch.ones(2, 2, 8))


def test_wrong_types_and_layouts_are_errors(generator: torch.Generator) -> None:
    q, k, v, table, kv_len, kv_lens, scale = PAGED.decode_arguments(generator, torch.float32)
    with pytest.raises(ValueError, match=r"q is torch\.bfloat16"):
        decode()(q.bfloat16(), k, v, table, kv_len, kv_lens, scale)
    with pytest.raises(ValueError, match=r"block_table is torch\.int64"):
        decode()(q, k, v, table.long(), kv_len, kv_lens, scale)
    with pytest.raises(ValueError, match="v_cache"):
        decode()(q, k, v[:, :8], table, kv_len, kv_lens, scale)
    with pytest.raises(ValueError, match="k_cache"):
        decode()(q, k.transpose(1, 2).contiguous().transpose(1, 2), v, table, kv_len, kv_lens, scale)
    with pytest.raises(ValueError, match="kv_len"):
        decode()(q, k, v, table, kv_len[:2], kv_lens, scale)
    with pytest.raises(ValueError, match="last dimension contiguous"):
        ops.silu_mul(TARGET)(torch.ones(8, 4).T)
    with pytest.raises(ValueError, match="weight"):
        ops.rms_norm(TARGET)(torch.ones(2, 8), torch.ones(7), 1e-5, None)


def test_nothing_to_do_is_done() -> None:
    y, residual = ops.rms_norm(TARGET)(torch.empty(0, 8), torch.ones(8), 1e-5, torch.empty(0, 8))
    assert y.shape == residual.shape == (0, 8)
    assert ops.silu_mul(TARGET)(torch.empty(0, 8)).shape == (0, 4)
    cache = torch.zeros(1, 16, 2, 8)
    ops.kv_store(TARGET)((torch.empty(0, 2, 8),), (cache,), torch.empty(0, dtype=torch.int64))
    table, no_rows = torch.empty(0, 4, dtype=torch.int32), torch.empty(0, dtype=torch.int32)
    blocks = torch.zeros(4, 16, 2, 64)
    assert decode()(torch.empty(0, 6, 64), blocks, blocks, table, no_rows, (), 1.0).shape == (0, 6, 64)


@pytest.mark.parametrize("isa", ISAS)
def test_an_instruction_set_opens_only_where_it_is_supported(isa: _ops.Isa) -> None:
    if _ops.supports(isa):
        _ops.Kernels(isa, "float32")
    else:
        with pytest.raises(ValueError, match=isa):
            _ops.Kernels(isa, "float32")
