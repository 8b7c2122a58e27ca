"""Inputs of the ops that see one token at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tokenspeed.kernels.forms import FORMS, GROUP, QUANTISED, Packed, Rows, pack, pack_quantised
from tokenspeed.kernels.numerics.case import Arguments, Case, Results, normal


def linear_cases() -> Iterator[Case]:
    few = ((tokens, 576, 193, tokens % 2 == 1, 0) for tokens in range(1, 18))
    odd = ((1, 64, 7, False, 0), (5, 33, 96, True, 3), (3, 1, 9, False, 0), (16, 1031, 17, True, 5))
    long = ((1, 4100, 24, False, 0), (32, 2048, 8, True, 0))
    many = ((33, 65, 97, True, 1), (64, 576, 192, True, 0), (300, 260, 130, False, 7), (47, 3, 20, True, 0))
    for tokens, k, n, bias, apart in itertools.chain(few, odd, long, many):
        name = f"{tokens}x{k}x{n}{'+bias' if bias else ''}{' apart' if apart else ''}"
        yield Case(name, {}, partial(linear_arguments, tokens, k, n, bias, apart))


def linear_arguments(
    tokens: int, k: int, n: int, bias: bool, apart: int, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    x, weight = (normal(g, dtype, rows, k + apart)[:, :k] for rows in (tokens, n))
    return x, weight, normal(g, dtype, n) if bias else None


def lm_head_cases() -> Iterator[Case]:
    for rows, hidden, vocab in ((1, 576, 193), (2, 65, 33), (5, 96, 517), (16, 130, 40), (33, 64, 300)):
        yield Case(f"{rows}x{hidden} → {vocab}", {}, partial(lm_head_arguments, rows, hidden, vocab), wide=True)


def lm_head_arguments(rows: int, hidden: int, vocab: int, g: torch.Generator, dtype: torch.dtype) -> Arguments:
    return normal(g, dtype, rows, hidden), normal(g, dtype, vocab, hidden)


def packed_cases() -> Iterator[tuple[str, int, int, int, bool]]:
    """form, tokens, columns, rows, bias: every path of every form, and what is not full where it may be."""
    sizes = ((1, 18, 193), (2, 3, 16), (3, 1, 80), (4, 9, 33), (5, 18, 40), (16, 2, 130), (70, 9, 97))
    for form in FORMS[1:]:
        for tokens, groups, rows in sizes:
            ragged = 5 if form == "panels" else 0
            yield form, tokens, groups * GROUP - ragged, rows, rows % 2 == 1


def packed_weight(
    form: str, rows: int, columns: int, g: torch.Generator, dtype: torch.dtype, size: float = 1.0
) -> Packed:
    """Weights of about this size."""
    if form == "panels":
        return pack(normal(g, dtype, rows, columns))
    kind, groups = QUANTISED[form], columns // GROUP
    most = 1 << kind.bits
    values = torch.randint(0, most, (rows, columns), generator=g, dtype=torch.int32)
    values = (values if kind.bits < 8 else values - most // 2).to(torch.uint8 if kind.bits < 8 else torch.int8)
    # Of few bits, as they are in files: a product with a value is exact.
    scales = (torch.randn(rows, groups * kind.spans, generator=g) * 4 * size / most).half().to(kind.scale)
    minimums = (torch.randn(rows, groups * kind.spans, generator=g) * size).to(kind.scale) if kind.minimums else None
    return pack_quantised(Rows(form, values, scales, minimums))


def packed_linear_cases() -> Iterator[Case]:
    for form, tokens, k, n, bias in packed_cases():
        name = f"{form} {tokens}x{k}x{n}{'+bias' if bias else ''}"
        yield Case(name, {"matrix_form": form}, partial(packed_linear_arguments, form, tokens, k, n, bias))


def packed_linear_arguments(
    form: str, tokens: int, k: int, n: int, bias: bool, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    x, weight = normal(g, dtype, tokens, k + 3)[:, :k], packed_weight(form, n, k, g, dtype)
    return x, weight, normal(g, dtype, n) if bias else None


def packed_lm_head_cases() -> Iterator[Case]:
    for form, rows, hidden, vocab, _ in packed_cases():
        made = partial(packed_lm_head_arguments, form, rows, hidden, vocab)
        yield Case(f"{form} {rows}x{hidden} → {vocab}", {"matrix_form": form}, made, wide=True)


def packed_lm_head_arguments(
    form: str, rows: int, hidden: int, vocab: int, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    return normal(g, dtype, rows, hidden), packed_weight(form, vocab, hidden, g, dtype)


def packed_embedding_cases() -> Iterator[Case]:
    for form, tokens, size, rows, _ in packed_cases():
        made = partial(packed_embedding_arguments, form, tokens, rows, size)
        yield Case(f"{form} {tokens} of {rows}x{size}", {"matrix_form": form}, made)


def packed_embedding_arguments(
    form: str, tokens: int, rows: int, size: int, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    return torch.randint(0, rows, (tokens,), generator=g), packed_weight(form, rows, size, g, dtype)


def embedding_cases() -> Iterator[Case]:
    for tokens, rows, size in ((9, 50, 24), (1, 3, 1000), (40, 7, 3)):
        yield Case(f"{tokens} of {rows}x{size}", {}, partial(embedding_arguments, tokens, rows, size))


def embedding_arguments(tokens: int, rows: int, size: int, g: torch.Generator, dtype: torch.dtype) -> Arguments:
    return torch.randint(0, rows, (tokens,), generator=g), normal(g, dtype, rows, size)


def rms_norm_cases() -> Iterator[Case]:
    sizes = ((1, 576, True, 0), (3, 17, False, 0), (5, 64, True, 3), (90, 1000, True, 8))
    for tokens, hidden, residual, apart in sizes:
        name = f"{tokens}x{hidden}{'+residual' if residual else ''}{' apart' if apart else ''}"
        yield Case(name, {}, partial(rms_norm_arguments, tokens, hidden, residual, apart))


def rms_norm_arguments(
    tokens: int, hidden: int, residual: bool, apart: int, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    x, gain, other = normal(g, dtype, tokens, hidden + apart), normal(g, dtype, hidden), None
    if residual:
        other = normal(g, dtype, tokens, hidden + apart)[:, :hidden]
    return x[:, :hidden], gain, 1e-5, other


def silu_mul_cases() -> Iterator[Case]:
    for tokens, size, spread in ((1, 1536, 1.0), (3, 13, 1.0), (70, 200, 30.0), (2, 40, 200.0)):
        yield Case(f"{tokens}x{size} ±{spread:g}", {}, partial(silu_mul_arguments, tokens, size, spread))


def silu_mul_arguments(tokens: int, size: int, spread: float, g: torch.Generator, dtype: torch.dtype) -> Arguments:
    gate_up = normal(g, dtype, tokens, 2 * size + 5)[:, : 2 * size]
    gate_up[:, :size] *= spread
    return (gate_up,)


def rotary_cases() -> Iterator[Case]:
    for tokens, heads, kv_heads, head_dim, interleaved in (
        (1, 9, 3, 64, False), (7, 4, 4, 80, False), (130, 8, 1, 128, False), (3, 2, 2, 20, False),
        (1, 1, 1, 2, True), (7, 4, 2, 64, True), (90, 8, 1, 128, True),
    ):  # fmt: skip
        name = f"{tokens}x{heads}/{kv_heads}x{head_dim}{' interleaved' if interleaved else ''}"
        traits = {"head_dim": head_dim, "interleaved": interleaved}
        yield Case(name, traits, partial(rotary_arguments, tokens, heads, kv_heads, head_dim), _rotated)


def rotary_arguments(
    tokens: int, heads: int, kv_heads: int, head_dim: int, g: torch.Generator, dtype: torch.dtype
) -> Arguments:
    # Slices of a fused projection whose heads have a part that is not rotated: nothing is contiguous.
    fused = normal(g, dtype, tokens, heads + kv_heads, head_dim + 16)[:, :, 8 : 8 + head_dim]
    positions = torch.randint(0, 200, (tokens,), generator=g)
    return fused[:, :heads], fused[:, heads:], positions, angles(g, 200, head_dim)


def angles(g: torch.Generator, positions: int, head_dim: int) -> Tensor:
    """A table of cosines and sines [positions, head_dim]."""
    angle = torch.rand(positions, head_dim // 2, generator=g) * 100
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def _rotated(arguments: Arguments, value: tuple[Tensor, Tensor]) -> Results:
    return arguments[0], arguments[1], *value


def quantise_cases() -> Iterator[Case]:
    for form, (tokens, size, block) in itertools.product(
        ("fp8", "int8"), ((1, 512, 128), (5, 300, 128), (33, 64, 64), (3, 17, 32))
    ):
        name = f"{tokens}x{size} {form} blocks of {block}"
        made = partial(quantise_arguments, tokens, size)
        yield Case(name, {"form": form, "block": block}, made, partial(_restored, block))


def quantise_arguments(tokens: int, size: int, g: torch.Generator, dtype: torch.dtype) -> Arguments:
    x = normal(g, dtype, tokens, size + 3)[:, :size]
    x *= (10.0 ** torch.randint(-2, 4, (tokens, 1), generator=g)).to(dtype)
    x[-1, : size // 2] = 0  # a block of nothing but zeros
    return (x,)


def _restored(block: int, arguments: Arguments, value: tuple[Tensor, Tensor]) -> Results:
    """What the numbers stand for."""
    (x,), (values, scales) = arguments, value
    wide = scales.repeat_interleave(block, dim=1)[:, : x.shape[1]]
    return ((values.float() * wide).to(x.dtype),)
