"""`python -m tokenspeed.parallel` explains and compares layouts from a config.json alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenspeed.entrypoints.api import main as serve
from tokenspeed.parallel.__main__ import main

FIELDS: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "dtype": "bfloat16",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 2,
    "norm_topk_prob": True,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(FIELDS))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], command: str, folder: Path, *flags: str) -> list[str]:
    assert main([command, "--model", str(folder), *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_equal_layers_are_told_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "explain", folder, "--world", "8", "--batch", "1", "16")
    assert lines[0].startswith("DeepseekV3ForCausalLM over 8 ranks: attention attn 8; dense dense 8; experts moe_tp 8")
    decode = lines[lines.index("a step of 16 tokens, captured") + 1 :]
    decode = decode[: decode.index("")]
    assert [line for line in decode if line.endswith(":")] == ["  layers 0 to 5, each:"]
    assert sum("all-reduce, then input_layernorm in one" in line and "ranks 0, 1, … 7" in line for line in decode) == 1
    # The embedding, two in each of six layers, the logits.
    assert decode[-1].startswith("  in all 14 transfers")
    table = [line.split() for line in lines[-2:]]
    assert [row[0] for row in table] == ["1", "16"] and all(len(row) == 7 for row in table)


def test_own_tokens_and_own_experts_are_dispatched(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "explain", folder, "--world", "8", "--attn-dp-size", "8", "--moe-ep-size", "8")
    assert "  layers 0 to 1, each:" in lines and "  layers 2 to 5, each:" in lines
    assert any(line.split()[:1] == ["dispatch"] for line in lines)
    assert "a step of 8192 tokens, 8 sampled from" in lines


def test_one_rank_sends_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "explain", folder, "--world", "1")
    whole = "; ".join(f"{part} whole" for part in ("attention", "dense", "experts", "vocabulary"))
    assert lines[0] == f"DeepseekV3ForCausalLM over 1 rank: {whole}"
    assert "  in all 0 transfers, 0 B sent by a rank, 0.00 ms" in lines


def test_links_and_machines_change_what_is_predicted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def step_ms(*flags: str) -> float:
        return float(said(capsys, "explain", folder, "--world", "8", "--batch", "8", *flags)[-1].split()[4])

    near, fast = (step_ms("--links", links) for links in ("nccl", "symmetric"))
    far = step_ms("--links", "nccl", "--ranks-per-machine", "4")
    assert fast < near < far
    assert fast <= step_ms() < near


def test_a_device_that_reads_faster_is_predicted_faster(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told(*flags: str) -> tuple[str, float]:
        lines = said(capsys, "explain", folder, "--world", "2", "--attn-copies", "2", "--batch", "8", *flags)
        assert "attention attn_copies 2; dense dense 2" in lines[0]
        return lines[2], float(lines[-1].split()[1])

    (described, slow), (_, usual) = told("--bandwidth", "1e9"), told()
    assert "memory 0.00 TB/s" in described and "12 µs a block" in described and slow > usual
    with pytest.raises(SystemExit):
        told("--bandwidth", "4.5")
    assert "bytes a second" in capsys.readouterr().err


def test_layouts_are_compared_the_fastest_first_and_those_that_cannot_be_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(capsys, "compare", folder, "--world", "16", "--batch", "4", "64")
    refused = lines.index("not possible:")
    times = [float(line[62:].split()[1]) for line in lines[2:refused]]
    assert len(times) > 8 and times == sorted(times)
    assert any("--attn-tp-size 4 --moe-ep-size 16 --attn-copies 4 " in line for line in lines[2:refused])
    assert any("--attn-tp-size 16" in line and "num_attention_heads (8)" in line for line in lines[refused:])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--attn-tp-size", "3"], "--attn-tp-size 3 does not divide a world of 8 ranks"),
        (["--moe-ep-size", "8", "--moe-tp-size", "2"], "--moe-ep-size 8 × --moe-tp-size 2 is 16"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["explain", "--model", str(folder), "--world", "8", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tokenspeed.parallel: ") and error.count("\n") == 1 and words in error


def test_collectives_of_one_rank_are_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "--world", "1", "--device", "cpu"]) == 1
    assert capsys.readouterr().err == "tokenspeed.parallel: --world 1: collectives are between two ranks and more\n"


def test_sizes_are_positive(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["explain", "--model", str(folder), "--world", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_the_server_explains_what_it_would_start_and_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(folder), "--load-format", "dummy", "--max-num-seqs", "24", "--explain-parallel"]
    assert serve(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("DeepseekV3ForCausalLM over 1 rank") and "a step of 24 tokens, captured" in lines
    assert [line.split()[0] for line in lines[-2:]] == ["1", "24"]
    assert serve([*flags, "-tp", "8", "--attn-dp-size", "8", "--moe-ep-size", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "over 8 ranks: attention attn_data 8;" in lines[0]
    assert "8 groups of ranks, 1 each, have requests and a KV pool of their own" in lines
    assert lines[-1].split()[0] == "192", "rows of all groups together"
    assert serve([*flags, "-tp", "8", "--attn-dp-size", "8", "--tps-floor", "50"]) == 2
    assert "--tps-floor 50 with --attn-dp-size 8" in capsys.readouterr().err
