"""The front-end benchmark plays to a real server and counts what arrives."""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path

import pytest

from tokenspeed.bench import front, vocabulary
from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.text.load import load_text


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    front.add_flags(parser)
    return parser.parse_args(flags)


def test_every_token_of_every_stream_is_counted_with_and_without_large_bodies() -> None:
    asked = options("--streams", "9", "--rate", "40", "--seconds", "1", "--vocabulary", "3000")
    alone, beside = asyncio.run(front.run(asked))
    for run in (alone, beside):
        assert 0 < run.tokens <= 9 * 80
        assert 0 < len(run.delays) <= 2 * 80 and min(run.delays) > 0
        assert run.cpu >= 0 and 0 < run.engine < run.delivered
        assert len(run.row().split()) >= 6
    assert alone.bodies == 0 < beside.bodies


@pytest.mark.parametrize("flags", [("--streams", "0"), ("--vocabulary", "10")])
def test_flags_without_sense_are_refused(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(options(*flags)) == 2
    assert flags[0] in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["0", "-1", "fast"])
def test_a_rate_is_a_positive_number(rate: str) -> None:
    with pytest.raises(SystemExit):
        options("--rate", rate)


def test_a_made_up_vocabulary_has_its_size_whole_words_and_a_template_that_shows_calls(tmp_path: Path) -> None:
    vocabulary.write_checkpoint(tmp_path, 5000, 4096)
    source = resolve(str(tmp_path), "dummy")
    text = load_text(source)
    model = read_model_config(source)
    assert text.tokenizer.vocab_size == model.vocab_size == 5000
    words = vocabulary.text(random.Random(4), 200)
    ids = text.tokenizer.encode(words)
    assert text.tokenizer.decode(ids) == words and len(ids) < 0.7 * len(words.encode())
    assert any(len(character.encode()) > 2 for character in words)
    assert text.template is not None and text.template.knows_tools
    assert text.tokenizer.encode("<tool_call>", parse_special=True) == [text.tokenizer.control["<tool_call>"]]
