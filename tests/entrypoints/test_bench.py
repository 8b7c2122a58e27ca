"""`python -m tokenspeed.bench serve` against the fake engine: it counts what was served and says what went wrong."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import pytest

from tests.entrypoints.served import Served, serving
from tokenspeed.bench import serve


@pytest.fixture(scope="module")
def slow() -> Iterator[Served]:
    with serving(user_keys=("key",), max_model_len=4096) as it:
        it.call(lambda: setattr(it.engine, "delay", 0.004))
        yield it


def bench(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    serve.add_flags(parser)
    return serve.main(parser.parse_args(flags))


def test_every_request_is_counted_with_the_wanted_lengths(slow: Served, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--concurrency", "1,3", "--num-requests", "3", "--input-len", "50", "--output-len", "12", "--json")
    before = len(slow.engine.submitted)
    assert bench("--url", slow.url, "--api-key", "key", *flags) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["concurrency"], row["requests"], row["errors"]) for row in rows] == [(1, 3, 0), (3, 3, 0)]
    assert [row["output_tokens"] for row in rows] == [36, 36]
    assert [row["prompt_tokens"] for row in rows] == [150, 150]
    sent = slow.engine.submitted[before:]
    assert len(sent) == 2 * (1 + 3)
    assert all(one["params"].ignore_eos for one in sent)
    for row in rows:
        assert 4.0 <= row["itl_p50_ms"] <= row["itl_p99_ms"]
        assert 4.0 <= row["ttft_p50_ms"] <= row["ttft_p99_ms"]
        assert 0.0 < row["stream_tok_s_p50"] <= 250.0


def test_a_shared_prefix_is_shared(slow: Served, capsys: pytest.CaptureFixture[str]) -> None:
    before = len(slow.engine.submitted)
    flags = ("--concurrency", "2", "--num-requests", "2", "--input-len", "60", "--output-len", "2")
    assert bench("--url", slow.url, "--api-key", "key", "--shared-prefix", "40", *flags) == 0
    prompts = [one["ids"] for one in slow.engine.submitted[before:]]
    assert len({tuple(prompt[:40]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "TTFT p50" in lines[0] and "tok/s a stream" in lines[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--url", "http://127.0.0.1:9"], "cannot reach http://127.0.0.1:9"),
        (["--url", "nonsense"], "cannot reach nonsense"),
        (["--url", "{url}", "--api-key", "wrong"], "answered 401"),
        (["--url", "{url}", "--api-key", "key", "--model", "other"], "does not serve other"),
        (["--url", "{url}", "--api-key", "key", "--shared-prefix", "256"], "--shared-prefix"),
        (["--url", "{url}", "--api-key", "key", "--output-len", "5000"], "the warm-up request failed"),
    ],
)
def test_what_cannot_run_is_one_line(
    slow: Served, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    flags = [flag.replace("{url}", slow.url) for flag in flags]
    if "5000" in flags:
        slow.call(lambda: setattr(slow.engine, "queue_limit", 0))
    try:
        assert bench(*flags) == 2
    finally:
        slow.call(lambda: setattr(slow.engine, "queue_limit", 1000))
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("bench: ") and err.count("\n") == 1


def test_failed_requests_are_errors_and_not_figures(slow: Served, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--concurrency", "1", "--num-requests", "2", "--input-len", "10", "--output-len", "20", "--json")
    slow.call(lambda: setattr(slow.engine, "fail_after", 12))
    try:
        assert bench("--url", slow.url, "--api-key", "key", *flags) == 1
    finally:
        slow.call(lambda: setattr(slow.engine, "fail_after", None))
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert (row["requests"], row["errors"], row["output_tokens"]) == (2, 2, 0)
    assert "2 × the model produced values that are not finite" in captured.err


@pytest.mark.parametrize(("percent", "value"), [(50, 2.0), (99, 4.0), (25, 1.0), (100, 4.0), (0, 1.0)])
def test_percentiles_are_by_nearest_rank(percent: float, value: float) -> None:
    assert serve.percentile([1.0, 2.0, 3.0, 4.0], percent) == value
    assert serve.percentile([], percent) == 0.0
