"""clang-tidy refuses what the types cannot: a state used after it was moved."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

FUNCTIONS = {
    "a state is asked after an event has consumed it": (
        "SlotId late(Decoding&& state) {",
        "  const Retracting retracting = on(std::move(state), Preempt{});",
        "  return state.slot();",
        "}",
    ),
    "a block goes the same way twice": (
        "void twice(CachedBlock&& block) {",
        "  const FreeBlock once = on(std::move(block), Evict{});",
        "  const FreeBlock again = on(std::move(block), Evict{});",
        "}",
    ),
    "a block goes into a table in every round of a loop": (
        "void looped(BlockTable& table, FreeBlock&& block) {",
        "  for (int i = 0; i < 2; ++i)",
        "    table.append(std::move(block));",
        "}",
    ),
}
"""In each, the last line but one uses what was moved."""

CONTROL = (
    "SlotId early(Decoding&& state) {",
    "  const SlotId slot = state.slot();",
    "  const Retracting retracting = on(std::move(state), Preempt{});",
    "  return slot;",
    "}",
)


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """What the linter says of all functions in one file, by line."""
    unit = tmp_path_factory.mktemp("lint") / "unit.cc"
    functions = [line for lines in (*FUNCTIONS.values(), CONTROL) for line in lines]
    unit.write_text("\n".join(['#include "transitions.h"', "namespace tokenspeed {", *functions, "}", ""]))
    done = subprocess.run([ROOT / "scripts/lint_cpp.sh", unit], capture_output=True, text=True, check=False)
    assert done.returncode != 0, "the linter found nothing"
    found = re.findall(rf"^{re.escape(str(unit))}:(\d+):\d+: error: (.*)$", done.stdout, re.MULTILINE)
    assert found, done.stdout + done.stderr
    return {int(line): message for line, message in found}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_linter_refuses_that(findings: dict[int, str], name: str) -> None:
    before = list(FUNCTIONS)[: list(FUNCTIONS).index(name)]
    first = 3 + sum(len(FUNCTIONS[other]) for other in before)
    assert "bugprone-use-after-move" in findings[first + len(FUNCTIONS[name]) - 2]


def test_it_refuses_nothing_else(findings: dict[int, str]) -> None:
    assert len(findings) == len(FUNCTIONS)
