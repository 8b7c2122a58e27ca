"""Measured choices: kept in a file, taken by number of tokens, and passed over where they do not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.test_selection import ATTENTION, CPU, implementation
from tokenspeed.kernels.platform import Platform
from tokenspeed.kernels.registry import Registry, Target
from tokenspeed.kernels.selection import ENVIRONMENT, Selector
from tokenspeed.kernels.tune import merged
from tokenspeed.kernels.winners import Winner, Winners, by_tokens

TARGET = Target(CPU, torch.float32)
MEASURED = (Winner(1, "slow"), Winner(8, "fast"), Winner(None, "slow"))


def selector(folder: Path) -> Selector:
    registry = Registry()
    registry.add([implementation("fast", priority=9), implementation("slow")])
    return Selector(registry, winners=Winners(folder))


def test_what_is_kept_is_found_by_another_process_and_nowhere_else(tmp_path: Path) -> None:
    path = Winners(tmp_path).put("mha_decode", TARGET, ATTENTION, MEASURED)
    Winners(tmp_path).put("linear", TARGET, {}, (Winner(None, "slow"),))
    found = Winners(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert found.find("mha_decode", TARGET, dict(reversed(ATTENTION.items()))) == MEASURED
    assert found.find("linear", TARGET, {}) == (Winner(None, "slow"),)
    assert found.find("mha_decode", TARGET, {**ATTENTION, "head_dim": 128}) == ()
    assert found.find("mha_decode", Target(CPU, torch.bfloat16), ATTENTION) == ()
    assert found.find("mha_decode", Target(Platform("cpu", "x86_64"), torch.float32), ATTENTION) == ()


def test_the_number_of_tokens_chooses_among_the_winners(tmp_path: Path) -> None:
    calls: list[str] = []
    kernels = {name: (lambda x, name=name: calls.append(name)) for name in ("a", "b", "c")}
    dispatch = by_tokens([(1, kernels["a"]), (8, kernels["b"]), (None, kernels["c"])])
    for tokens in (0, 1, 2, 8, 9, 500):
        dispatch(torch.zeros(tokens, 3))
    dispatch(((torch.zeros(2, 3), torch.zeros(2, 3)),))
    assert calls == ["a", "a", "b", "b", "c", "c", "b"]


def test_a_measured_choice_is_taken_before_a_higher_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    Winners(tmp_path).put("mha_decode", TARGET, ATTENTION, (Winner(None, "slow"),))
    assert selector(tmp_path).select("mha_decode", TARGET, ATTENTION)() == "slow"
    assert selector(tmp_path / "empty").select("mha_decode", TARGET, ATTENTION)() == "fast"


def test_a_forced_kernel_is_taken_before_a_measured_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Winners(tmp_path).put("mha_decode", TARGET, ATTENTION, (Winner(None, "slow"),))
    monkeypatch.setenv(ENVIRONMENT, "mha_decode=fast")
    assert selector(tmp_path).select("mha_decode", TARGET, ATTENTION)() == "fast"


def test_a_winner_that_is_no_longer_there_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    Winners(tmp_path).put("mha_decode", TARGET, ATTENTION, (Winner(8, "gone"), Winner(None, "slow")))
    assert selector(tmp_path).select("mha_decode", TARGET, ATTENTION)() == "fast"


ENTRY = '{"entries": [{"op": "linear", "dtype": "float32", "traits": %s, "winners": %s}]}'


def test_an_entry_as_the_next_test_writes_them_is_taken_when_it_is_sound(tmp_path: Path) -> None:
    winners = Winners(tmp_path)
    winners.path(CPU).write_text(ENTRY % ("{}", '[[1, "fast"], [null, "slow"]]'))
    assert winners.find("linear", TARGET, {}) == (Winner(1, "fast"), Winner(None, "slow"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"entries": [{"op": "linear"}]}',
        ENTRY % ("{}", "[]"),
        ENTRY % ("{}", '[[8, "slow"]]'),
        ENTRY % ("{}", '[[8, "slow"], [1, "fast"], [null, "slow"]]'),
        ENTRY % ("3", '[[null, "slow"]]'),
    ],
)
def test_a_file_that_tune_did_not_write_is_named_and_not_used(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    winners = Winners(tmp_path)
    winners.path(CPU).write_text(text)
    assert winners.find("linear", TARGET, {}) == ()
    assert winners.find("linear", TARGET, {}) == ()
    assert len(caplog.records) == 1 and str(winners.path(CPU)) in caplog.text


def test_neighbouring_buckets_of_one_winner_become_one() -> None:
    found = [Winner(1, "a"), Winner(8, "a"), Winner(32, "b"), Winner(128, "b")]
    assert merged(found) == [Winner(8, "a"), Winner(None, "b")]
