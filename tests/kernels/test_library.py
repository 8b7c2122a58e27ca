"""Where the kernels of torch's libraries are chosen, and the lengths that cuDNN is asked for. What they compute,
`test_interpreted.py` and the suite on a GPU say."""

from __future__ import annotations

import pytest
import torch

from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Target, TraitValue
from tokenspeed.kernels.selection import default, select

HEADS: dict[str, TraitValue] = {
    "num_heads": 16, "nope_dim": 128, "v_dim": 128, "kv_lora_rank": 512, "rope_dim": 64, "block_size": 64
}  # fmt: skip
EXPERTS: dict[str, TraitValue] = {
    "num_experts": 66, "num_shared": 2, "hidden_size": 2048, "intermediate_size": 1408
}  # fmt: skip


def chosen(op: str, arch: str, traits: dict[str, TraitValue], dtype: torch.dtype = torch.bfloat16) -> str:
    platform = Platform("nvidia", arch, frozenset({"sm80", arch}))
    implementation = default().explain(op, Target(platform, dtype), traits, forced={}).chosen
    assert implementation is not None
    return implementation.name


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91_500)


@pytest.mark.usefixtures("cudnn")
def test_long_prompts_are_the_libraries_on_a_hopper_alone() -> None:
    pytest.importorskip("triton")
    assert chosen("mla_prefill", "sm90", HEADS) == chosen("moe_experts", "sm90", EXPERTS) == "library"
    assert chosen("mla_prefill", "sm80", HEADS) == chosen("moe_experts", "sm80", EXPERTS) == "triton"


@pytest.mark.usefixtures("cudnn")
def test_what_the_libraries_have_no_fast_kernel_for_is_left_to_triton() -> None:
    pytest.importorskip("triton")
    assert chosen("mla_prefill", "sm90", HEADS | {"nope_dim": 64}) == "triton"
    assert chosen("moe_experts", "sm90", EXPERTS, torch.float16) == "triton"


def test_without_cudnn_prompts_are_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert chosen("mla_prefill", "sm90", HEADS) == "triton"


@pytest.mark.usefixtures("cudnn")
def test_many_short_chunks_are_few_calls_and_a_long_one_is_alone() -> None:
    pytest.importorskip("triton")
    platform = Platform("nvidia", "sm90", frozenset({"sm80", "sm90"}))
    prefill = select("mla_prefill", Target(platform, torch.bfloat16), **HEADS)

    def runs(*query_lens: int) -> list[tuple[int, int]]:
        return list(prefill._runs(query_lens, 2))

    # Slices of four queries, 256 a call: 15 in a chunk of 60.
    assert runs(*(60,) * 40) == [(0, 17), (17, 34), (34, 40)]
    assert runs(*(1,) * 100, 128) == [(0, 101)]
    assert runs(100, 129, 5, 1000, 1024, 3, 4) == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 7)]
