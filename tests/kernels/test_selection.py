"""Which kernel is chosen, how that is explained and forced, and what is refused."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tokenspeed.kernels import ops, selection
from tokenspeed.kernels.block_weights import DenseLayer
from tokenspeed.kernels.composed.blocks import BLOCKS, Stack, bind_block
from tokenspeed.kernels.numerics.block_cases import stack_arguments
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import (
    OPS,
    PARTS,
    DeclarationError,
    Implementation,
    Kernel,
    Multiple,
    On,
    OneOf,
    Registry,
    SelectionError,
    Target,
    Traits,
    TraitValue,
    lazy,
)
from tokenspeed.kernels.selection import ENVIRONMENT, Selector

CPU = Platform("cpu", "x86_64", frozenset({"avx2", "fma"}))
HOPPER = Platform("nvidia", "sm90", frozenset({"sm80", "sm90"}))
ATTENTION = {"num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "block_size": 64}


def named(name: str) -> Callable[[Target, Traits], Kernel]:
    """A bind whose kernel returns its name."""
    return lambda target, traits: lambda: name


def implementation(backend: str, op: str = "mha_decode", variant: str = "", **options: object) -> Implementation:
    return Implementation(op, backend, named(backend + variant), variant=variant, **options)  # type: ignore[arg-type]


def selector(*implementations: Implementation) -> Selector:
    registry = Registry()
    registry.add(implementations)
    return Selector(registry)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_the_highest_legal_priority_is_chosen() -> None:
    chooses = selector(
        implementation("slow", priority=1),
        implementation("fast", priority=9, platforms=(On("cpu", isa=frozenset({"avx2"})),)),
        implementation("faster", priority=10, platforms=(On("cpu", isa=frozenset({"avx512f"})),)),
        implementation("hopper", priority=99, platforms=(On("nvidia", "sm90"),)),
    )
    assert chooses.select("mha_decode", Target(CPU, torch.float32), ATTENTION)() == "fast"
    assert chooses.select("mha_decode", Target(HOPPER, torch.float32), ATTENTION)() == "hopper"
    assert chooses.select("mha_decode", Target(Platform("npu", ""), torch.float32), ATTENTION)() == "slow"


@pytest.mark.parametrize(
    ("priority", "forced", "form"),
    [(2, {}, "panels"), (1, {}, "rows"), (2, {"linear": "cpu"}, "rows"), (2, {"packed_linear": "slow"}, "rows")],
)
def test_plain_matrices_are_packed_where_that_is_declared_better_and_nobody_forces_rows(
    priority: int, forced: dict[str, str], form: str
) -> None:
    chooses = selector(
        implementation("cpu", op="linear", priority=1),
        implementation("cpu", op="packed_linear", priority=priority, dtypes=frozenset({torch.bfloat16})),
        implementation("slow", op="packed_linear"),
    )
    assert chooses.plain_form(Target(CPU, torch.bfloat16), forced) == form
    assert chooses.plain_form(Target(CPU, torch.float32), forced) == "rows"


def test_at_equal_priority_the_first_declared_is_chosen() -> None:
    chooses = selector(implementation("first"), implementation("second"))
    assert chooses.select("mha_decode", Target(CPU, torch.float32), ATTENTION)() == "first"


def test_a_newer_chip_runs_what_needs_an_older_one() -> None:
    chooses = selector(implementation("ampere", platforms=(On("nvidia", isa=frozenset({"sm80"})),)))
    assert chooses.select("mha_decode", Target(HOPPER, torch.bfloat16), ATTENTION)() == "ampere"


@pytest.mark.parametrize(
    ("options", "traits", "reason"),
    [
        ({"dtypes": frozenset({torch.bfloat16})}, ATTENTION, "does not take float32"),
        ({"platforms": (On("nvidia"),)}, ATTENTION, "runs on nvidia, not on cpu"),
        ({"platforms": (On("cpu", "aarch64"),)}, ATTENTION, "runs on aarch64, not on x86_64"),
        ({"platforms": (On("cpu", isa=frozenset({"amx_bf16"})),)}, ATTENTION, "needs amx_bf16"),
        ({"traits": {"head_dim": OneOf(frozenset({80, 128}))}}, ATTENTION, "head_dim=64 is not in {80, 128}"),
        ({"traits": {"head_dim": Multiple(48)}}, ATTENTION, "head_dim=64 is not a multiple of 48"),
        ({"traits": {"head_dim": Multiple(16, at_most=32)}}, ATTENTION, "at most 32"),
        ({"unavailable": lambda: "wheel is not installed"}, ATTENTION, "wheel is not installed"),
    ],
)
def test_what_is_illegal_is_refused_with_the_reason(options: dict[str, object], traits: Traits, reason: str) -> None:
    with pytest.raises(SelectionError, match=reason.replace("{", r"\{")):
        selector(implementation("only", **options)).select("mha_decode", Target(CPU, torch.float32), traits)


def test_a_trait_that_is_missing_or_unknown_is_refused() -> None:
    chooses = selector(implementation("only"))
    with pytest.raises(SelectionError, match="needs the traits block_size, head_dim"):
        chooses.select("mha_decode", Target(CPU, torch.float32), {"num_heads": 8, "num_kv_heads": 2})
    with pytest.raises(SelectionError, match="has no trait colour"):
        chooses.select("mha_decode", Target(CPU, torch.float32), {**ATTENTION, "colour": "red"})


@pytest.mark.parametrize(
    "second",
    [
        implementation("cpu"),
        implementation("cpu", priority=5),
        implementation("cpu", dtypes=frozenset({torch.float32})),
        implementation("cpu", platforms=(On("nvidia"), On("cpu"))),
        implementation("cpu", traits={"head_dim": OneOf(frozenset({64}))}),
    ],
    ids=["equal", "other priority", "one type", "one platform", "one trait"],
)
def test_a_second_declaration_with_the_same_key_is_an_error(second: Implementation) -> None:
    registry = Registry()
    registry.add([implementation("cpu")])
    with pytest.raises(DeclarationError, match="mha_decode=cpu is declared twice"):
        registry.add([second])
    with pytest.raises(DeclarationError, match="declared twice"):
        Registry().add([implementation("cpu"), second])


@pytest.mark.parametrize(
    "second",
    [
        implementation("other"),
        implementation("cpu", variant="avx2"),
        implementation("cpu", op="mha_prefill"),
        implementation("cpu", dtypes=frozenset({torch.bfloat16})),
        implementation("cpu", platforms=(On("nvidia"),)),
        implementation("cpu", platforms=(On("cpu", isa=frozenset({"avx2"})),)),
        implementation("cpu", traits={"head_dim": OneOf(frozenset({80, 96}))}),
    ],
    ids=["backend", "variant", "op", "type", "platform", "features", "trait"],
)
def test_declarations_that_differ_in_one_part_of_the_key_stand_together(second: Implementation) -> None:
    registry = Registry()
    first = implementation(
        "cpu", platforms=(On("cpu"),), dtypes=frozenset({torch.float32}), traits={"head_dim": Multiple(64)}
    )
    assert registry.add([first, second]) == 2


def test_unknown_ops_and_traits_cannot_be_declared() -> None:
    registry = Registry()
    with pytest.raises(DeclarationError, match="unknown op 'convolve'"):
        registry.add([implementation("cpu"), implementation("cpu", op="convolve")])
    with pytest.raises(DeclarationError, match="unknown traits: colour"):
        registry.add([implementation("cpu", traits={"colour": Multiple(2)})])
    assert registry.all() == ()


def test_a_forced_backend_or_variant_is_chosen_over_a_better_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chooses = selector(
        implementation("reference"),
        implementation("cpu", variant="portable", priority=1),
        implementation("cpu", variant="avx2", priority=2),
    )
    target = Target(CPU, torch.float32)
    for setting, chosen in (
        ("", "cpuavx2"),
        ("mha_decode=reference", "reference"),
        ("mha_decode=cpu", "cpuavx2"),
        (" mha_decode = cpu:portable , ", "cpuportable"),
    ):
        monkeypatch.setenv(ENVIRONMENT, setting)
        assert chooses.select("mha_decode", target, ATTENTION)() == chosen


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mha_decode", "'mha_decode' is not of the form op=backend"),
        ("mha_decode=", "not of the form op=backend"),
        ("convolve=cpu", "unknown op 'convolve'"),
        ("linear=tpu", "linear has no backend 'tpu'; it has cpu"),
        ("mha_decode=gpu", "runs on nvidia, not on cpu"),
        ("mha_decode=cpu,mha_decode=gpu", "mha_decode is forced twice"),
    ],
)
def test_a_forced_kernel_that_cannot_be_is_an_error(
    setting: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chooses = selector(
        implementation("cpu"), implementation("gpu", platforms=(On("nvidia"),)), implementation("cpu", op="linear")
    )
    monkeypatch.setenv(ENVIRONMENT, setting)
    with pytest.raises(SelectionError, match=message):
        chooses.select("mha_decode", Target(CPU, torch.float32), ATTENTION)


def test_a_forced_part_of_a_composite_is_not_hidden_by_a_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    chooses = selector(
        implementation("reference", op="lm_head_sample"),
        implementation("composed", op="lm_head_sample", priority=1, selects_parts=True),
        implementation("fused", op="lm_head_sample", priority=9),
        implementation("reference", op="sample"),
        implementation("reference", op="rotary"),
    )
    target, traits = Target(CPU, torch.float32), {"hidden_size": 64, "vocab_size": 300}
    for setting, chosen in (
        ("rotary=reference", "fused"),
        ("sample=reference", "composed"),
        ("sample=reference,lm_head_sample=fused", "fused"),
    ):
        monkeypatch.setenv(ENVIRONMENT, setting)
        assert chooses.select("lm_head_sample", target, traits)() == chosen


def test_a_forced_part_of_a_part_is_not_hidden_either(monkeypatch: pytest.MonkeyPatch) -> None:
    chooses = selector(
        implementation("composed", op="stack_decode", priority=1, selects_parts=True),
        implementation("fused", op="stack_decode", priority=9),
        implementation("reference", op="silu_mul"),
    )
    traits: Traits = dict.fromkeys(OPS["stack_decode"], 2)
    assert chooses.select("stack_decode", Target(CPU, torch.float32), traits)() == "fused"
    monkeypatch.setenv(ENVIRONMENT, "silu_mul=reference")
    assert chooses.select("stack_decode", Target(CPU, torch.float32), traits)() == "composed"


@pytest.mark.parametrize("op", BLOCKS)
def test_the_parts_of_a_composite_are_those_that_its_composition_chooses(op: str) -> None:
    chosen: set[str] = set()

    def choose(part: str, target: Target, **traits: TraitValue) -> Kernel:
        assert set(traits) == set(OPS[part])
        chosen.add(part)
        return print

    numbers: dict[str, TraitValue] = dict.fromkeys(OPS[op], 2)
    for form in ("rows", "q8_0"):
        forms = {name: form for name in OPS[op] if name.endswith("_form")}
        bound = bind_block(op, choose)(Target(CPU, torch.float32), numbers | forms)
        if isinstance(bound, Stack):  # which needs layers to choose for
            bound.blocks_of(stack_layer())
    assert chosen == set(PARTS[op])


def stack_layer() -> DenseLayer:
    sizes = {
        "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "block_size": 16
    }  # fmt: skip
    arguments = stack_arguments((1,), ("rows",), sizes, False, False, torch.Generator(), torch.float32)
    layer: DenseLayer = arguments[1][0]
    return layer


def test_an_explanation_names_the_choice_the_rest_and_what_is_open() -> None:
    chooses = selector(
        implementation("reference"),
        implementation("cpu", priority=3, traits={"head_dim": Multiple(16)}),
        implementation("gpu", priority=9, platforms=(On("nvidia"),)),
    )
    explanation = chooses.explain("mha_decode", Target(CPU, torch.float32), {"block_size": 16}, forced={})
    assert str(explanation).splitlines() == [
        "mha_decode on cpu x86_64 (avx2 fma), float32, block_size=16",
        "  chosen   cpu             priority 3; if head_dim is a multiple of 16",
        "  legal    reference       priority 0",
        "  rejected gpu             priority 9; runs on nvidia, not on cpu",
    ]


def test_a_lazy_bind_is_imported_when_it_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late_kernel.py").write_text("def bind(target, traits):\n    return lambda: traits['head_dim']\n")
    monkeypatch.syspath_prepend(tmp_path)
    chooses = selector(Implementation("mha_decode", "late", lazy("late_kernel:bind")))
    chooses.explain("mha_decode", Target(CPU, torch.float32), ATTENTION)
    assert "late_kernel" not in sys.modules
    assert chooses.select("mha_decode", Target(CPU, torch.float32), ATTENTION)() == 64


def test_this_machine_prefers_its_compiled_kernels_to_the_reference() -> None:
    explanation = selection.default().explain(
        "mha_decode", Target(Platform.of(torch.device("cpu")), torch.float32), ATTENTION
    )
    assert explanation.chosen is not None and explanation.chosen.backend == "cpu"


def test_a_head_that_the_compiled_kernels_cannot_take_goes_to_the_reference() -> None:
    target = Target(Platform.of(torch.device("cpu")), torch.float32)
    explanation = selection.default().explain("mha_decode", target, {**ATTENTION, "head_dim": 76})
    assert explanation.chosen is not None and explanation.chosen.backend == "reference"


@pytest.mark.parametrize("op", OPS)
def test_the_face_of_an_op_passes_exactly_its_traits(op: str) -> None:
    target, *traits = inspect.signature(getattr(ops, op)).parameters
    assert target == "target" and set(traits) == set(OPS[op])
