"""The decode benchmark runs the shapes that it is asked for, and relates them to the right bounds."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.models import families
from tests.toy import toy_llama
from tokenspeed.bench import decode
from tokenspeed.executor import kernel_times


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    decode.add_flags(parser)
    return parser.parse_args(["--model", "m", *flags])


@pytest.mark.parametrize("shape", ["8", "8x", "x1024", "0x5", "8x-1", "8×1024"])
def test_a_shape_that_is_none_is_refused_with_its_form(shape: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--shape", shape)
    assert "STREAMSxTOKENS" in capsys.readouterr().err


def test_the_limit_counts_the_weights_of_a_shape_and_the_cache_of_all_its_streams() -> None:
    asked = options(
        "--shape", "1x1000", "4x2000", "--num-tokens", "20", "--weight-bytes", "1e6", "3e6", "--kv-bytes", "100",
        "--bandwidth", "1e9",
    )  # fmt: skip
    mean = decode.WARM_TOKENS + 10
    assert decode.limit(0, asked) == pytest.approx(1e9 / (1e6 + 100 * (1000 + mean)))
    assert decode.limit(1, asked) == pytest.approx(4e9 / (3e6 + 4 * 100 * (2000 + mean)))
    asked.weight_bytes = [2e6]
    assert decode.limit(1, asked) == pytest.approx(4e9 / (2e6 + 4 * 100 * (2000 + mean)))
    asked.weight_bytes = []
    assert decode.limit(0, asked) is None


@pytest.mark.skipif(kernel_times.available(), reason="there is a GPU")
def test_a_profile_without_a_gpu_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="none here"):
        decode.main(options("--model", str(tmp_path / "absent"), "--profile", str(tmp_path / "profile")))


def test_every_shape_gets_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TOKENSPEED_DEVICE", "cpu")
    toy_llama(tmp_path)
    asked = options("--model", str(tmp_path), "--shape", "1x20", "3x40", "--num-tokens", "10", "--peer", "0.5")
    assert decode.main(asked) == 0
    first, second = [line for line in capsys.readouterr().out.splitlines() if " × " in line][1:]
    assert first.startswith("| 1 × 20 |") and second.startswith("| 3 × 40 |")
    rate = float(first.split("**")[1].replace(",", ""))
    assert float(first.split("|")[-2]) == pytest.approx(2 * rate, abs=1.01)
    assert second.split("|")[-2].strip() == "–"
    # A llama has no experts; three rows of 48 to 50 tokens lie in as many blocks of 64 and, being written, no more.
    assert [cell.strip() for cell in second.split("|")[-5:-3]] == ["–", "3"]


def test_the_experts_that_a_step_reads_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 8 experts, one token chooses 3; four tokens choose between 3 and 8 of them."""
    monkeypatch.setenv("TOKENSPEED_DEVICE", "cpu")
    families.write(tmp_path, "deepseek-v2-lite")
    asked = options("--model", str(tmp_path), "--shape", "1x20", "4x20", "--num-tokens", "10")
    assert decode.main(asked) == 0
    one, four = [line.split("|")[-5] for line in capsys.readouterr().out.splitlines() if " × " in line][1:]
    assert one.strip() == "3.0 (3–3)"
    assert 3.0 <= float(four.split()[0]) <= 8.0 and four.strip() != one.strip()
