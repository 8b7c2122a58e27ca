"""Groups of ranks are given up without waiting, and torch finds a set of ranks for as long as its memory is held."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch._C import _distributed_c10d as c10d

from tokenspeed.parallel import groups
from tokenspeed.parallel.groups import Groups
from tokenspeed.parallel.symmetric import SymmetricMemory


class Ending:
    def __init__(self, how: str) -> None:
        self.aborted = threading.Event()
        self._how = how

    def abort(self) -> None:
        self.aborted.set()
        if self._how == "fails":
            raise RuntimeError("it was broken")
        if self._how == "hangs":
            threading.Event().wait()


def test_a_group_that_does_not_end_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "LEAVE_SECONDS", 0.05)
    made: list[Any] = [Ending("fails"), Ending("ends"), Ending("hangs")]
    several = Groups(lambda name, ranks: made[len(ranks) - 1])
    assert [several.of(tuple(range(size))) for size in (1, 2, 3)] == made
    several.leave()
    assert all(each.aborted.is_set() for each in made)


def test_torch_finds_ranks_by_their_name_while_their_group_is_held() -> None:
    memory = SymmetricMemory(c10d.HashStore(), 0, torch.device("cpu"))
    name, group = memory._group("one", 0, 1)
    assert c10d._resolve_process_group(name) == group
    del group
    with pytest.raises(RuntimeError):
        c10d._resolve_process_group(name)
