"""`python -m tokenspeed.kernels`: what each subcommand prints, and that what is refused is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenspeed.kernels import __main__ as command
from tokenspeed.kernels import measure
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import OPS, Implementation, Registry, Target, plain
from tokenspeed.kernels.selection import ENVIRONMENT, Selector, default
from tokenspeed.kernels.winners import CACHE, Winners
from tokenspeed.kernels.workloads import WORKLOADS, traits_of

FEW = ["tokens=3", "intermediate_size=32", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(measure, "SECONDS", 0.001)
    monkeypatch.setattr(measure, "CPU_CACHE", 1 << 16)
    monkeypatch.setattr(measure, "CPU_STREAM", 1 << 20)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert command.main(arguments) == 0
    return capsys.readouterr().out.splitlines()


def test_every_op_is_on_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(OPS) <= {line.split()[0] for line in printed(capsys, "list")}


def test_an_explanation_of_every_shape(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "explain", "mha_decode", "head_dim=64,70", "--device", "cpu", "--dtype", "float32")
    assert any(line.startswith("mha_decode on cpu") and line.endswith("head_dim=64") for line in lines)
    assert any("head_dim=70 is not a multiple of 8" in line for line in lines)


def test_numerics_prints_the_worst_case_of_each_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "numerics", "silu_mul", "--device", "cpu", "--dtype", "float32")
    assert any(line.split()[:4] == ["silu_mul", "reference", "cpu", "float32"] and " ok " in line for line in lines)
    assert all("4 cases" in line and "worst: " in line for line in lines)


def test_numerics_fails_with_a_line_that_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry()
    half = Implementation("silu_mul", "half", plain(lambda gate_up: gate_up.chunk(2, dim=-1)[0] / 2))
    registry.add([*(each for each in default().registry.of("silu_mul") if each.backend == "reference"), half])
    monkeypatch.setattr(command, "default", lambda: Selector(registry))
    assert command.main(["numerics", "silu_mul", "--device", "cpu", "--dtype", "float32"]) == 1
    wrong = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "WRONG" in line]
    assert wrong == ["half"]


def test_bench_prints_every_implementation_on_every_shape(capsys: pytest.CaptureFixture[str]) -> None:
    title, _, *lines = printed(capsys, "bench", "silu_mul", "tokens=1,3", *FEW[1:])
    assert "memory gives " in title and "GB/s" in title
    names = [each.name for each in default().registry.of("silu_mul") if each.backend in ("cpu", "reference")]
    assert {line[2:].split()[0] for line in lines} <= set(names) and "reference" in str(lines)
    assert {line.split("  ")[-1] for line in lines} == {f"tokens={n} intermediate_size=32" for n in (1, 3)}
    assert sum(line.startswith("*") for line in lines) == 2


def test_bench_counts_the_operations_of_products(capsys: pytest.CaptureFixture[str]) -> None:
    """Every token of 3 has 2 of 8 experts and the shared one: 9 pairs of three products of 64 × 64."""
    sizes = {"tokens": 3, "top_k": 2, "num_experts": 9, "num_shared": 1, "hidden_size": 64, "intermediate_size": 64}
    workload = WORKLOADS["moe_experts"]
    arguments = workload.arguments(sizes, torch.float32, torch.device("cpu"))
    assert workload.flop is not None and workload.flop(sizes, arguments) == 9 * 3 * 2 * 64 * 64
    # Two rows of 2 new tokens behind 7: 8 + 9 tokens are seen.
    prefill = WORKLOADS["mla_prefill"]
    sizes = prefill.sizes({"rows": 2, "new": 2, "context": 9, "num_heads": 3, "kv_lora_rank": 32, "rope_dim": 16})
    arguments = prefill.arguments(sizes, torch.float32, torch.device("cpu"))
    assert prefill.flop is not None and prefill.flop(sizes, arguments) == 2 * 17 * 3 * 2 * (128 + 16 + 128)
    _, header, *lines = printed(capsys, "bench", "linear", "tokens=4", "in=64", "out=64", *FEW[2:])
    assert "TFLOP/s" in header and all(float(line.split()[-5]) >= 0 and line.split()[-4] == "–" for line in lines)


def test_what_tune_found_is_what_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"cpu:portable": {1: 9.0, 8: 1.0}, "reference": {1: 1.0, 8: 9.0}}

    def seconds(kernel: object, data: list[tuple[torch.Tensor]], device: torch.device) -> float:
        name = "reference" if getattr(kernel, "__module__", "").endswith("reference.silu_mul") else "cpu:portable"
        return times[name][data[0][0].shape[0]]

    monkeypatch.setattr("tokenspeed.kernels.tune.seconds_a_call", seconds)
    registry = Registry()
    kept = ("reference", "cpu:portable")
    registry.add(each for each in default().registry.of("silu_mul") if each.name in kept)
    monkeypatch.setattr(command, "default", lambda: Selector(registry, winners=Winners.of_user()))
    lines = printed(capsys, "tune", "silu_mul", "tokens=8,1", *FEW[1:])
    assert [line.split(" of ")[0] for line in lines[:2]] == ["tokens=1: reference", "tokens=8: cpu:portable"]
    assert "kept in " in lines[2]
    explained = printed(capsys, "explain", "silu_mul", "--device", "cpu", "--dtype", "float32")
    assert explained[1] == "measured: up to 1 tokens: reference, more: cpu:portable"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "convolve"], "unknown op 'convolve'"),
        (["explain", "linear", "--device", "warp"], "device"),
        (["explain", "rotary", "head_dim"], "not of the form NAME=VALUE"),
        (["explain", "rotary", "colour=red"], "rotary has no trait colour"),
        (["numerics", "convolve"], "unknown op 'convolve'"),
        (["bench", "convolve"], "unknown op 'convolve'"),
        (["bench", "linear", "colour=3"], "'colour' is none of the sizes tokens, in, out"),
        (["bench", "linear", "tokens=many"], "tokens=many is not a number"),
        (["bench", "linear", "tokens=-1"], "tokens=-1 is not a number"),
        (["bench", "linear", "tokens=1", "tokens=2"], "tokens is given twice"),
        (["bench", "linear", "tokens=1,"], "not of the form NAME=VALUE"),
        (["bench", "quantise", "form=fp4"], "form=fp4 is not fp8 or int8"),
        (["bench", "mha_decode", "rows=0"], "no call has these sizes"),
        (["bench", "rotary", "head_dim=7"], "no call has these sizes: cos_sin"),
        (["tune", "rotary", "head_dim=7"], "no call has these sizes: cos_sin"),
        (["tune", "convolve"], "unknown op 'convolve'"),
        (["tune", "linear", "colour=3"], "'colour' is none of the sizes"),
    ],
)
def test_what_is_refused_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_forced_kernel_that_cannot_run_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(ENVIRONMENT, "silu_mul=triton")
    assert command.main(["bench", "silu_mul", *FEW]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"tokenspeed.kernels: {ENVIRONMENT}: silu_mul=triton cannot run silu_mul on cpu")
    assert "triton runs on nvidia, not on cpu" in error and error.count("\n") == 1


def test_shapes_are_all_combinations() -> None:
    shapes = command.shapes_of(["a=1,2", "b=true", "c=x"])
    assert shapes == [{"a": 1, "b": True, "c": "x"}, {"a": 2, "b": True, "c": "x"}]
    assert command.shapes_of([]) == [{}]


SMALL = {
    "context": 9, "width": 5, "new": 3, "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "in": 32,
    "out": 24, "num_heads": 4, "num_kv_heads": 2, "kv_lora_rank": 32, "rope_dim": 16, "nope_dim": 16, "v_dim": 16,
    "block_size": 16, "num_experts": 8, "top_k": 2, "num_shared": 1,
}  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_workload_that_its_reference_takes(op: str) -> None:
    workload = WORKLOADS[op]
    sizes = workload.sizes({name: SMALL[name] for name in workload.defaults if name in SMALL})
    (reference,) = (each for each in default().registry.of(op) if each.backend == "reference")
    target = Target(Platform("cpu", ""), torch.float32)
    arguments = workload.arguments(sizes, torch.float32, torch.device("cpu"))
    value = reference.bind(target, traits_of(op, sizes))(*arguments)
    assert workload.moved(sizes, arguments, value) > 0
