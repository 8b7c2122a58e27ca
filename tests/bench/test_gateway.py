"""The benchmark of the gRPC door plays to a real server and counts what arrives."""

from __future__ import annotations

import argparse
import asyncio

import pytest

from tokenspeed.bench import gateway
from tokenspeed.bench.front import add_flags


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(flags)


def test_every_token_of_every_stream_is_counted_in_shared_chunks_and_in_chunks_of_their_own() -> None:
    asked = options("--streams", "9", "--rate", "40", "--seconds", "1", "--vocabulary", "3000")
    found = asyncio.run(gateway.run(asked))
    for run, shared in found:
        assert 0 < run.tokens <= 9 * 80
        assert 0 < len(run.delays) <= 2 * 80 and min(run.delays) > 0
        assert run.cpu >= 0 and 0 < run.engine < run.delivered and run.bodies == 0
        assert 1.0 <= shared < 80
    assert [run.name for run, _ in found] == ["shared chunks", "a chunk a token"]


@pytest.mark.parametrize("flags", [("--streams", "0"), ("--vocabulary", "10")])
def test_flags_without_sense_are_refused(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert gateway.main(options(*flags)) == 2
    assert flags[0] in capsys.readouterr().err
