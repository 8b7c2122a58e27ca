"""Every implementation of every op that runs on this machine, against the reference in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from tokenspeed.kernels.numerics import attention_cases, block_cases, dense_cases, moe_cases, peer_cases, step_cases
from tokenspeed.kernels.numerics.case import Arguments, Case, Results, copied, num_elements, poisoned, worst_error
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Implementation, Kernel, KernelError, Target
from tokenspeed.kernels.selection import Selector, default

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Largest ‖out − reference‖ / ‖reference‖ of any one token, by the type of the inputs."""

INTERPRETED = 300_000
"""Elements of all inputs up to which an interpreted kernel is run on a case: the others take an hour."""

CASES: Mapping[str, Callable[[], Iterator[Case]]] = {
    "all_reduce_norm": peer_cases.all_reduce_norm_cases,
    "decode_inputs": step_cases.decode_inputs_cases,
    "embedding": dense_cases.embedding_cases,
    "gqa_block_decode": block_cases.gqa_block_cases,
    "kv_store": attention_cases.kv_store_cases,
    "linear": dense_cases.linear_cases,
    "lm_head": dense_cases.lm_head_cases,
    "lm_head_sample": block_cases.lm_head_cases,
    "mha_decode": attention_cases.mha_decode_cases,
    "mha_prefill": attention_cases.mha_prefill_cases,
    "mla_block_decode": block_cases.mla_block_cases,
    "mla_decode": attention_cases.mla_decode_cases,
    "mla_prefill": attention_cases.mla_prefill_cases,
    "mlp_block_decode": block_cases.mlp_block_cases,
    "moe_block_decode": block_cases.moe_block_cases,
    "moe_experts": moe_cases.moe_experts_cases,
    "moe_route": moe_cases.moe_route_cases,
    "packed_embedding": dense_cases.packed_embedding_cases,
    "packed_linear": dense_cases.packed_linear_cases,
    "packed_lm_head": dense_cases.packed_lm_head_cases,
    "quantise": dense_cases.quantise_cases,
    "rms_norm": dense_cases.rms_norm_cases,
    "rotary": dense_cases.rotary_cases,
    "sample": step_cases.sample_cases,
    "silu_mul": dense_cases.silu_mul_cases,
    "stack_decode": block_cases.stack_cases,
}


@dataclass(frozen=True)
class Trial:
    """One implementation on one case (the `index`-th of its op), type and device."""

    implementation: Implementation
    index: int
    case: Case
    dtype: torch.dtype
    device: torch.device

    def kernel(self) -> Kernel:
        """The implementation, bound."""
        return self.implementation.bind(Target(Platform.of(self.device), self.dtype), self.case.traits)

    def error(self, kernel: Kernel | None = None) -> float:
        """How far it (or another kernel of the op) is from the reference in float64; infinite where anything is
        unwritten or not finite."""
        arguments, wanted = _expected(self.implementation.op, self.index, self.dtype)
        return error_of(kernel or self.kernel(), self.case, arguments, wanted, self.device)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[torch.float32 if self.case.wide else self.dtype]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.implementation.op}={self.implementation.name}, {self.case.name}, {dtype}, {self.device.type}"


def error_of(kernel: Kernel, case: Case, arguments: Arguments, wanted: Results, device: torch.device) -> float:
    """How far a bound kernel is from what is wanted on one case. The arguments stay as they are."""
    given = copied(arguments, device)
    with poisoned():
        results = case.results(given, kernel(*given))
    if len(results) != len(wanted):
        return float("inf")
    if case.exact:
        pairs = zip(results, wanted, strict=True)
        return 0.0 if all(torch.equal(result.cpu(), right) for result, right in pairs) else float("inf")
    dtypes = {torch.float32} if case.wide else {each.dtype for each in _floats(arguments)}
    # Where no argument has a type (rows of a table in whole numbers), only the target says what is wanted.
    if dtypes and not {result.dtype for result in results} <= dtypes:
        return float("inf")
    return max(worst_error(result, right) for result, right in zip(results, wanted, strict=True))


def _floats(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, tuple):
        for each in value:
            yield from _floats(each)
    elif isinstance(value, torch.Tensor) and value.is_floating_point():
        yield value


def wanted_of(op: str, case: Case, arguments: Arguments, selector: Selector) -> Results:
    """What the reference makes of the arguments in float64."""
    (reference,) = (each for each in selector.registry.of(op) if each.backend == "reference")
    kernel = reference.bind(Target(Platform("cpu", ""), torch.float64), case.traits)
    wide = copied(arguments, torch.device("cpu"), torch.float64)
    return case.results(wide, kernel(*wide))


@functools.cache
def _cases(op: str) -> tuple[Case, ...]:
    return tuple(CASES[op]())


@functools.lru_cache(maxsize=64)
def _expected(op: str, index: int, dtype: torch.dtype) -> tuple[Arguments, Results]:
    """Inputs rounded to `dtype`, and what the reference makes of them in float64."""
    case = _cases(op)[index]
    arguments = case.arguments(torch.Generator().manual_seed(index), dtype)
    return arguments, wanted_of(op, case, arguments, default())


def devices() -> list[torch.device]:
    """The CPU, and the GPU if there is one."""
    return [torch.device("cpu"), *([torch.device("cuda", 0)] if torch.cuda.is_available() else [])]


def trials(
    selector: Selector,
    on: Sequence[torch.device],
    ops: Sequence[str] = tuple(CASES),
    dtypes: Sequence[torch.dtype] = tuple(TOLERANCE),
    interpreted: int = INTERPRETED,
) -> Iterator[Trial]:
    """Everything that may run on these devices, case by case; of an interpreted kernel those cases whose inputs have at
    most so many elements. Raises `KernelError` for an op that is none."""
    for op in ops:
        if op not in CASES:
            raise KernelError(f"unknown op {op!r}; ops are {', '.join(CASES)}")
    for op, device, dtype in itertools.product(ops, on, dtypes):
        target = Target(Platform.of(device), dtype)
        for index, case in enumerate(_cases(op)):
            if (case.exact and dtype is not torch.float32) or (case.large and device.type == "cpu"):
                continue
            for verdict in selector.explain(op, target, case.traits, forced={}).verdicts:
                on_cpu = device.type == "cpu" and verdict.implementation.variant != "interpreter"
                if verdict.reasons or (on_cpu and case.captured):
                    continue
                if device.type == "cuda" or on_cpu or _num_elements(op, index, dtype) <= interpreted:
                    yield Trial(verdict.implementation, index, case, dtype, device)


def _num_elements(op: str, index: int, dtype: torch.dtype) -> int:
    return num_elements(_cases(op)[index].arguments(torch.Generator().manual_seed(index), dtype))


@dataclass(frozen=True)
class Line:
    """One line of the table: the worst of an implementation's cases on one device and type."""

    op: str
    name: str
    device: str
    dtype: torch.dtype
    cases: int
    error: float
    tolerance: float
    worst: str

    @property
    def good(self) -> bool:
        return self.error < self.tolerance

    def __str__(self) -> str:
        where = f"{self.op:18}{self.name:20}{self.device:6}{str(self.dtype).removeprefix('torch.'):10}"
        verdict = "ok   " if self.good else "WRONG"
        return f"{where}{self.cases:4} cases  {self.error:.1e}  {verdict}  worst: {self.worst}"


def table(found: Iterator[Trial]) -> Iterator[Line]:
    """The lines, each as soon as its trials have run."""
    for (op, device, dtype), group in itertools.groupby(found, lambda t: (t.implementation.op, t.device.type, t.dtype)):
        kinds: dict[str, list[Trial]] = {}
        for trial in group:
            kinds.setdefault(trial.implementation.name, []).append(trial)
        for name, members in sorted(kinds.items()):
            errors = [(trial.error(), trial.case.name) for trial in members]
            error, worst = max(errors)
            yield Line(op, name, device, dtype, len(members), error, members[0].tolerance, worst)
