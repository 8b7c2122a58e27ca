"""Every implementation of every op that runs here gives what the reference gives in float64.

`python tests/kernels/test_numerics.py` prints the errors as a table.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.mla_moe_cases import MLA_MOE_CASES
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import OPS, Implementation, Target, TraitValue
from tokenspeed.kernels.selection import default

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest ‖out − reference‖ / ‖reference‖ of any one token."""

DEVICES = [torch.device(name) for name in ("cpu", "cuda") if name == "cpu" or torch.cuda.is_available()]

Arguments = tuple[Any, ...]
Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call. `results` picks what to compare from the arguments after the call and the value returned."""

    name: str
    traits: dict[str, TraitValue]
    arguments: Callable[[torch.Generator, torch.dtype], Arguments]
    results: Callable[[Arguments, Any], Results]


def returned(arguments: Arguments, value: Any) -> Results:
    return value if isinstance(value, tuple) else (value,)


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def linear_cases() -> Iterator[Case]:
    few = ((tokens, 576, 193, tokens % 2 == 1, 0) for tokens in range(1, 18))
    odd = ((1, 64, 7, False, 0), (5, 33, 96, True, 3), (3, 1, 9, False, 0), (16, 1031, 17, True, 5))
    long = ((1, 4100, 24, False, 0), (32, 2048, 8, True, 0))
    many = ((33, 65, 97, True, 1), (64, 576, 192, True, 0), (300, 260, 130, False, 7), (47, 3, 20, True, 0))
    for tokens, k, n, bias, padding in itertools.chain(few, odd, long, many):

        def arguments(g: torch.Generator, dtype: torch.dtype, t=tokens, k=k, n=n, bias=bias, p=padding) -> Arguments:
            x, weight = normal(g, dtype, t, k + p)[:, :k], normal(g, dtype, n, k + p)[:, :k]
            return x, weight, normal(g, dtype, n) if bias else None

        yield Case(f"{tokens}x{k}x{n}{'+bias' if bias else ''}{' apart' if padding else ''}", {}, arguments, returned)


def embedding_cases() -> Iterator[Case]:
    def arguments(g: torch.Generator, dtype: torch.dtype) -> Arguments:
        return torch.randint(0, 50, (9,), generator=g), normal(g, dtype, 50, 24)

    yield Case("9 of 50", {}, arguments, returned)


def rms_norm_cases() -> Iterator[Case]:
    for tokens, hidden, residual, padding in (
        (1, 576, True, 0),
        (3, 17, False, 0),
        (5, 64, True, 3),
        (90, 1000, True, 8),
    ):

        def arguments(g: torch.Generator, dtype: torch.dtype, t=tokens, h=hidden, r=residual, p=padding) -> Arguments:
            x = normal(g, dtype, t, h + p)[:, :h]
            return x, normal(g, dtype, h), 1e-5, normal(g, dtype, t, h + p)[:, :h] if r else None

        yield Case(
            f"{tokens}x{hidden}{'+residual' if residual else ''}{' apart' if padding else ''}", {}, arguments, returned
        )


def silu_mul_cases() -> Iterator[Case]:
    for tokens, size, spread in ((1, 1536, 1.0), (3, 13, 1.0), (70, 200, 30.0), (2, 40, 200.0)):

        def arguments(g: torch.Generator, dtype: torch.dtype, t=tokens, n=size, spread=spread) -> Arguments:
            gate_up = normal(g, dtype, t, 2 * n + 5)[:, : 2 * n]
            gate_up[:, :n] *= spread
            return (gate_up,)

        yield Case(f"{tokens}x{size} ±{spread:g}", {}, arguments, returned)


def rotary_cases() -> Iterator[Case]:
    for tokens, heads, kv_heads, head_dim, interleaved in itertools.chain(
        ((1, 9, 3, 64, False), (7, 4, 4, 80, False), (130, 8, 1, 128, False)),
        ((1, 1, 1, 2, True), (7, 4, 2, 64, True), (90, 8, 1, 128, True), (3, 2, 2, 20, False)),
    ):

        def arguments(g: torch.Generator, dtype: torch.dtype, t=tokens, hq=heads, hk=kv_heads, d=head_dim) -> Arguments:
            # Slices of a fused projection whose heads have a part that is not rotated: nothing is contiguous.
            fused = normal(g, dtype, t, hq + hk, d + 16)[:, :, 8 : 8 + d]
            angle = torch.rand(200, d // 2, generator=g) * 100
            table = torch.cat((angle.cos(), angle.sin()), dim=1)
            return fused[:, :hq], fused[:, hq:], torch.randint(0, 200, (t,), generator=g), table

        traits: dict[str, TraitValue] = {"head_dim": head_dim, "interleaved": interleaved}
        yield Case(
            f"{tokens}x{heads}/{kv_heads}x{head_dim}{' interleaved' if interleaved else ''}",
            traits,
            arguments,
            lambda arguments, value: (arguments[0], arguments[1], *value),
        )


def kv_store_cases() -> Iterator[Case]:
    for tokens, heads, head_dim, block_size in ((1, 3, 64, 16), (33, 2, 80, 64), (300, 8, 128, 16)):

        def arguments(
            g: torch.Generator, dtype: torch.dtype, t=tokens, h=heads, d=head_dim, size=block_size
        ) -> Arguments:
            blocks = 2 + 2 * t // size
            fused = normal(g, dtype, t, 3, h, d)
            caches = tuple(torch.full((blocks, size, h, d), 7.0, dtype=dtype) for _ in range(2))
            return (fused[:, 0], fused[:, 2]), caches, torch.randperm(blocks * size, generator=g)[:t]

        def caches(arguments: Arguments, value: None) -> Results:
            k, v = arguments[1]
            return k, v

        yield Case(f"{tokens}x{heads}x{head_dim} in blocks of {block_size}", {}, arguments, caches)


@dataclass(frozen=True)
class Paged:
    """Rows of (new tokens, length) over a cache in which everything outside the rows is NaN."""

    rows: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int

    def arguments(self, g: torch.Generator, dtype: torch.dtype) -> Arguments:
        """The arguments of `mha_prefill`; permuted blocks, entries past a row's length that do not exist."""
        needed = [-(-length // self.block_size) for _, length in self.rows]
        order = torch.randperm(sum(needed) + 3, generator=g, dtype=torch.int32)
        caches = [
            torch.full((sum(needed) + 3, self.block_size, self.kv_heads, self.head_dim), torch.nan, dtype=dtype)
            for _ in range(2)
        ]
        table = torch.full((len(self.rows), max(needed) + 2), 1_000_000, dtype=torch.int32)
        taken = 0
        for row, (_, length) in enumerate(self.rows):
            blocks = order[taken : taken + needed[row]]
            table[row, : needed[row]] = blocks
            taken += needed[row]
            for cache in caches:
                kv = torch.full((needed[row] * self.block_size, self.kv_heads, self.head_dim), torch.nan, dtype=dtype)
                kv[:length] = normal(g, dtype, length, self.kv_heads, self.head_dim)
                cache[blocks.long()] = kv.view(needed[row], self.block_size, self.kv_heads, self.head_dim)
        query_lens = tuple(new for new, _ in self.rows)
        kv_lens = tuple(length for _, length in self.rows)
        fused = normal(g, dtype, sum(query_lens), self.heads + 2 * self.kv_heads, self.head_dim)
        starts = torch.tensor([40, *(40 + start for start in itertools.accumulate(query_lens))], dtype=torch.int32)
        return (
            fused[:, : self.heads] * 2,
            *caches,
            table,
            starts,
            torch.tensor(kv_lens, dtype=torch.int32),
            query_lens,
            kv_lens,
            self.head_dim**-0.5,
        )

    def decode_arguments(self, g: torch.Generator, dtype: torch.dtype) -> Arguments:
        q, k, v, table, _, kv_len, _, kv_lens, scale = self.arguments(g, dtype)
        return q, k, v, table, kv_len, kv_lens, scale

    @property
    def traits(self) -> dict[str, TraitValue]:
        return {
            "num_heads": self.heads,
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "block_size": self.block_size,
        }

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads}x{self.head_dim} blocks of {self.block_size} rows {len(self.rows)}"


def mha_decode_cases() -> Iterator[Case]:
    edges = (1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300)
    for heads, kv_heads, head_dim, block_size, lengths in (
        (9, 3, 64, 16, edges),
        (9, 3, 64, 64, (1000, 1, 513)),
        (4, 4, 80, 64, edges),
        (8, 1, 128, 256, (700, 255, 256, 257, 1)),
        (8, 1, 16, 16, (1,)),
        (3, 1, 256, 64, (130, 64)),
    ):
        paged = Paged(tuple((1, length) for length in lengths), heads, kv_heads, head_dim, block_size)
        yield Case(str(paged), paged.traits, paged.decode_arguments, returned)


def mha_prefill_cases() -> Iterator[Case]:
    for heads, kv_heads, head_dim, block_size, rows in (
        (9, 3, 64, 16, ((1, 1), (17, 17), (1, 40), (65, 130), (33, 96))),
        (9, 3, 64, 64, ((64, 64), (63, 128), (5, 257))),
        (4, 4, 80, 64, ((100, 100), (2, 65), (1, 64))),
        (8, 1, 128, 256, ((40, 300), (256, 256))),
        (128, 1, 32, 16, ((3, 20),)),
        (3, 1, 256, 64, ((70, 70),)),
    ):
        paged = Paged(rows, heads, kv_heads, head_dim, block_size)
        yield Case(str(paged), paged.traits, paged.arguments, returned)


def mla_moe_cases(op: str) -> Iterator[Case]:
    return (Case(*made) for made in MLA_MOE_CASES[op]())


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "embedding": embedding_cases,
    "kv_store": kv_store_cases,
    "linear": linear_cases,
    "mha_decode": mha_decode_cases,
    "mha_prefill": mha_prefill_cases,
    "rms_norm": rms_norm_cases,
    "rotary": rotary_cases,
    "silu_mul": silu_mul_cases,
    **{op: functools.partial(mla_moe_cases, op) for op in MLA_MOE_CASES},
}


def copied(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The same arguments in fresh memory of the same layout, floating tensors in another type if asked."""
    if isinstance(value, tuple):
        return tuple(copied(each, device, dtype) for each in value)
    if not isinstance(value, Tensor):
        return value
    fresh = torch.empty_strided(
        value.shape,
        value.stride(),
        dtype=dtype if dtype is not None and value.is_floating_point() else value.dtype,
        device=device,
    )
    return fresh.copy_(value)


def run(kernel: Callable[..., Any], case: Case, arguments: Arguments) -> Results:
    return case.results(arguments, kernel(*arguments))


def worst_error(result: Tensor, reference: Tensor) -> float:
    """Relative error of the worst token; infinite where anything is not finite."""
    result = result.double().cpu().flatten(1)
    reference = reference.double().cpu().flatten(1)
    if result.shape != reference.shape or not bool(result.isfinite().all()):
        return float("inf")
    error = (result - reference).norm(dim=1) / reference.norm(dim=1).clamp_min(1e-30)
    return float(error.max()) if error.numel() else 0.0


@functools.cache
def expected(op: str, index: int, dtype: torch.dtype) -> tuple[Arguments, Results]:
    """Inputs rounded to `dtype`, and what the reference makes of them in float64."""
    case = list(CASES[op]())[index]
    arguments = case.arguments(torch.Generator().manual_seed(index), dtype)
    target = Target(Platform("cpu", ""), torch.float64)
    reference = next(each for each in default().registry.of(op) if each.backend == "reference")
    host = torch.device("cpu")
    wide = copied(arguments, host, torch.float64)
    return arguments, run(reference.bind(target, case.traits), case, wide)


def error_of(implementation: Implementation, index: int, dtype: torch.dtype, device: torch.device) -> float:
    case = list(CASES[implementation.op]())[index]
    arguments, reference = expected(implementation.op, index, dtype)
    kernel = implementation.bind(Target(Platform.of(device), dtype), case.traits)
    results = run(kernel, case, copied(arguments, device))
    assert len(results) == len(reference)
    assert all(result.dtype is dtype for result in results)
    return max(worst_error(result, wanted) for result, wanted in zip(results, reference, strict=True))


def runnable() -> Iterator[tuple[Implementation, int, Case, torch.dtype, torch.device]]:
    """Everything that may run on this machine: by implementation, case, type and device."""
    for op, device, dtype in itertools.product(CASES, DEVICES, TOLERANCE):
        for index, case in enumerate(CASES[op]()):
            verdicts = default().explain(op, Target(Platform.of(device), dtype), case.traits, forced={}).verdicts
            for verdict in verdicts:
                if not verdict.reasons:
                    yield verdict.implementation, index, case, dtype, device


def identify(value: object) -> str | None:
    match value:
        case Implementation():
            return f"{value.op}={value.name}"
        case Case():
            return value.name
        case torch.dtype():
            return str(value).removeprefix("torch.")
        case torch.device():
            return value.type
        case _:
            return ""


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from torch.empty is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("implementation", "index", "case", "dtype", "device"), list(runnable()), ids=identify)
def test_agrees_with_the_reference_in_float64(
    implementation: Implementation, index: int, case: Case, dtype: torch.dtype, device: torch.device, poisoned: None
) -> None:
    error = error_of(implementation, index, dtype, device)
    assert error < TOLERANCE[dtype], f"relative error {error:.2e}, allowed {TOLERANCE[dtype]:.0e}"


def test_every_op_with_something_to_compare_has_cases() -> None:
    def runs(implementation: Implementation) -> bool:
        platforms = [Platform.of(device) for device in DEVICES]
        fits = any(on.rejects(platform) is None for on in implementation.platforms for platform in platforms)
        return implementation.backend != "reference" and fits and implementation.unavailable() is None

    assert {each.op for each in default().registry.all() if runs(each)} <= set(CASES)
    assert set(CASES) <= set(OPS)


def test_poison_is_seen(poisoned: None) -> None:
    assert worst_error(torch.empty(2, 3), torch.ones(2, 3)) == float("inf")


def test_one_wrong_token_among_many_is_seen() -> None:
    right = torch.randn(500, 64)
    wrong = right.clone()
    wrong[499, 3] += 0.01
    assert worst_error(wrong, right) > TOLERANCE[torch.float32]


def main() -> None:
    torch.use_deterministic_algorithms(True)
    worst: dict[tuple[str, str, str, str], float] = {}
    for implementation, index, _, dtype, device in runnable():
        key = (implementation.op, implementation.name, device.type, str(dtype).removeprefix("torch."))
        worst[key] = max(worst.get(key, 0.0), error_of(implementation, index, dtype, device))
    for key, error in worst.items():
        print("".join(f"{part:14}" for part in key) + f"{error:.2e}")


if __name__ == "__main__":
    main()
