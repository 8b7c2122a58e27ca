"""Latent attention on the CPU: order of sums, rows that see nothing, and no wild reads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tokenspeed.kernels import ops
from tokenspeed.kernels.numerics.attention_cases import mla_decode_arguments, mla_prefill_arguments
from tokenspeed.kernels.numerics.case import Arguments, worst_error
from tokenspeed.kernels.numerics.suite import TOLERANCE
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.reference.mla_decode import mla_decode as decode_reference
from tokenspeed.kernels.reference.mla_prefill import mla_prefill as reference

CPU = Platform.of(torch.device("cpu"))
TARGET = ops.Target(CPU, torch.float32)
LATENT = {"num_heads": 5, "kv_lora_rank": 64, "rope_dim": 32, "block_size": 16}
EXPANDED = {
    torch.float32: LATENT | {"nope_dim": 24, "v_dim": 20},
    torch.bfloat16: LATENT | {"nope_dim": 32, "v_dim": 32},  # in whole pairs
}
LENGTHS = (700, 3, 65)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def decode(dtype: torch.dtype = torch.float32) -> ops.MlaDecode:
    return ops.mla_decode(ops.Target(CPU, dtype), **LATENT)


def prefill(dtype: torch.dtype = torch.float32) -> ops.MlaPrefill:
    return ops.mla_prefill(ops.Target(CPU, dtype), **EXPANDED[dtype])


def decoding(generator: torch.Generator, queries: int = 2, dtype: torch.dtype = torch.float32) -> Arguments:
    return mla_decode_arguments(LENGTHS, 5, queries, 16, 64, 32, generator, dtype)


def chunks(
    generator: torch.Generator,
    query_lens: tuple[int, ...],
    kv_lens: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Arguments:
    return mla_prefill_arguments(query_lens, kv_lens, EXPANDED[dtype], generator, dtype)


def test_a_row_has_the_same_bits_alone_and_in_a_batch(generator: torch.Generator, dtype: torch.dtype) -> None:
    q_latent, q_rope, cache, table, kv_len, scale = decoding(generator, dtype=dtype)
    together = decode(dtype)(q_latent, q_rope, cache, table, kv_len, scale)
    for row in range(3):
        one = slice(row, row + 1)
        alone = decode(dtype)(q_latent[one], q_rope[one], cache, table[one], kv_len[one], scale)
        assert torch.equal(alone[0], together[row])


def test_a_query_has_the_same_bits_alone_and_before_others(generator: torch.Generator, dtype: torch.dtype) -> None:
    q_latent, q_rope, cache, table, kv_len, scale = decoding(generator, dtype=dtype, queries=3)
    together = decode(dtype)(q_latent, q_rope, cache, table, kv_len, scale)
    for query in range(3):
        at = slice(query, query + 1)
        alone = decode(dtype)(q_latent[:, at], q_rope[:, at], cache, table, kv_len - 2 + query, scale)
        assert torch.equal(alone[:, 0], together[:, query])


def test_the_number_of_threads_changes_no_bit(
    generator: torch.Generator, dtype: torch.dtype, restored_threads: None
) -> None:
    decoded, prompts = decoding(generator, dtype=dtype), chunks(generator, (300, 2, 40), (700, 60, 40), dtype)
    results = []
    for threads in (1, 2, 5, 40):
        torch.set_num_threads(threads)
        results.append((decode(dtype)(*decoded), prefill(dtype)(*prompts)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("cut", [50, 64, 91])
def test_long_chunks_of_a_prompt_give_the_same_bits_as_the_whole(
    cut: int, generator: torch.Generator, dtype: torch.dtype
) -> None:
    q, cache, table, _, _, _, _, k_up, v_up, scale = chunks(generator, (141,), (141,), dtype)

    def chunk(begin: int, end: int) -> torch.Tensor:
        starts, length = torch.tensor([0, end - begin], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
        return prefill(dtype)(q[begin:end], cache, table, starts, length, (end - begin,), (end,), k_up, v_up, scale)

    assert torch.equal(torch.cat((chunk(0, cut), chunk(cut, 141))), chunk(0, 141))


@pytest.mark.parametrize("new", [1, 5, 30, 31, 96, 97, 250])
@pytest.mark.parametrize("sign", [1, -1])
def test_absorbed_and_expanded_agree_with_the_reference(
    new: int, sign: int, generator: torch.Generator, dtype: torch.dtype
) -> None:
    q, cache, *rest, k_up, v_up, scale = chunks(generator, (new,), (250,), dtype)
    wanted = reference(q.double(), cache.double(), *rest, k_up.double(), v_up.double(), sign * scale)
    assert worst_error(prefill(dtype)(q, cache, *rest, k_up, v_up, sign * scale), wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("new", [3, 200])
def test_what_lies_behind_the_last_token_is_not_used(new: int, generator: torch.Generator, dtype: torch.dtype) -> None:
    q, cache, table, *rest = chunks(generator, (new,), (249,), dtype)
    right = prefill(dtype)(q, cache, table, *rest)
    behind = cache[table[0, 249 // 16], 249 % 16 :]
    assert behind.isnan().all()
    behind.fill_(1e4)
    assert torch.equal(prefill(dtype)(q, cache, table, *rest), right)


def test_rows_in_blocks_too_short_for_pairs_agree_with_the_reference(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    short = LATENT | {"block_size": 8}
    arguments = mla_decode_arguments(LENGTHS, 5, 2, 8, 64, 32, generator, dtype)
    wanted = decode_reference(
        *(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in arguments)
    )
    got = ops.mla_decode(ops.Target(CPU, dtype), **short)(*arguments)
    assert worst_error(got, wanted) < TOLERANCE[dtype]


def test_queries_that_see_nothing_give_zeros_and_leave_the_others_alone(
    generator: torch.Generator, dtype: torch.dtype
) -> None:
    q_latent, q_rope, cache, table, kv_len, scale = decoding(generator, dtype=dtype, queries=2)
    whole = decode(dtype)(q_latent, q_rope, cache, table, kv_len, scale)
    kv_len[1], table[1, 1:] = 1, -1
    out = decode(dtype)(q_latent, q_rope, cache, table, kv_len, scale)
    assert not out[1, 0].any() and out[1, 1].any() and torch.equal(out[::2], whole[::2])
    kv_len[1], table[1] = 0, -1
    assert not decode(dtype)(q_latent, q_rope, cache, table, kv_len, scale)[1].any()


@pytest.mark.parametrize("bad", [-1, 1_000_000])
def test_a_block_that_does_not_exist_is_an_error(bad: int, generator: torch.Generator) -> None:
    q_latent, q_rope, cache, table, kv_len, scale = decoding(generator)
    table[2, 4] = bad
    with pytest.raises(IndexError, match="row 2"):
        decode()(q_latent, q_rope, cache, table, kv_len, scale)
    for new in (1, 60):  # absorbed, expanded
        arguments = chunks(generator, (new,), (90,))
        arguments[2][0, 3] = bad
        with pytest.raises(IndexError, match="row"):
            prefill()(*arguments)


@pytest.mark.parametrize("length", [-3, 2_000_000_000])
def test_a_length_that_the_table_cannot_hold_is_an_error(length: int, generator: torch.Generator) -> None:
    q_latent, q_rope, cache, table, kv_len, scale = decoding(generator)
    kv_len[1] = length
    with pytest.raises(IndexError, match="row 1"):
        decode()(q_latent, q_rope, cache, table, kv_len, scale)


def test_more_new_tokens_than_the_row_has_are_an_error(generator: torch.Generator) -> None:
    arguments = list(chunks(generator, (5, 40), (9, 40)))
    arguments[6] = (9, 39)
    with pytest.raises(IndexError, match="row 1"):
        prefill()(*arguments)


def test_wrong_types_and_layouts_are_errors(generator: torch.Generator) -> None:
    q_latent, q_rope, cache, table, kv_len, scale = decoding(generator)
    with pytest.raises(ValueError, match=r"q_latent is torch\.bfloat16"):
        decode()(q_latent.bfloat16(), q_rope, cache, table, kv_len, scale)
    with pytest.raises(ValueError, match="q_rope"):
        decode()(q_latent, q_rope[:, :1], cache, table, kv_len, scale)
    with pytest.raises(ValueError, match="kv_cache"):
        decode()(q_latent, q_rope, cache[..., :64], table, kv_len, scale)
    q, cache, *rest, k_up, v_up, scale = chunks(generator, (40,), (40,))
    with pytest.raises(ValueError, match="rows of a head"):
        prefill()(q, cache, *rest, k_up.transpose(0, 1).contiguous().transpose(0, 1), v_up, scale)
    with pytest.raises(ValueError, match="v_up"):
        prefill()(q, cache, *rest, k_up, v_up[:, 1:], scale)


def test_no_rows_are_no_work(generator: torch.Generator) -> None:
    q_latent, q_rope, cache, table, kv_len, scale = decoding(generator)
    assert decode()(q_latent[:0], q_rope[:0], cache, table[:0], kv_len[:0], scale).shape == (0, 2, 5, 64)
