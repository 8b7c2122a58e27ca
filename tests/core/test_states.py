"""What must not compile does not: each illegal line is given to the compiler, and its message is read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++, whose messages are read")

LEGAL: dict[str, set[str]] = {
    "Waiting": {"Admit", "Finish", "Abort"},
    "Prefilling": {"Compute", "Fill", "Preempt", "Finish", "Abort"},
    "Decoding": {"Grow", "Compute", "Fill", "Append", "Preempt", "Finish", "Abort"},
    "Retracting": {"Fill", "Append", "Land", "Finish", "Abort"},
    "Draining": {"Land"},
    "Finished": set(),
}
EVENTS = ("Admit", "Compute", "Grow", "Fill", "Append", "Preempt", "Finish", "Abort", "Land")

LEGAL_BLOCK: dict[str, set[str]] = {
    "FreeBlock": {"Open"},
    "WritableBlock": {"Seal"},
    "SealedBlock": {"Withdraw"},
    "WithdrawnBlock": set(),
    "CachedBlock": {"Hit", "Evict", "Withdraw"},
}
BLOCK_EVENTS = ("Open", "Seal", "Hit", "Evict", "Withdraw")

NO_OVERLOAD = "no matching function"
PRIVATE = "is private within this context"
DELETED = "use of deleted function"
DROPPED = "ignoring return"

MISUSES = (
    ("Waiting again(Waiting& s) { return s; }", DELETED),
    ("void twice(Slot& a) { Slot b = a; }", DELETED),
    ("void shared(WritableBlock& b) { WritableBlock other = b; }", DELETED),
    ("void drop(Decoding&& s) { on(std::move(s), Preempt{}); }", DROPPED),
    ("void lose(BlockPool& pool) { pool.take(); }", DROPPED),
    ("Filled claim() { return Filled(64); }", PRIVATE),
    ("Landed hope() { return Landed(StepId{7}); }", PRIVATE),
    ("Seal forge(const Hash& h) { return Seal(h); }", PRIVATE),
    ("Finished conjure() { return Finished(); }", PRIVATE),
    ("WritableBlock conjure(BlockPool& pool) { return WritableBlock(pool, BlockId{0}); }", PRIVATE),
    ("BlockTable steal(Draining&& s) { return std::move(s.table_); }", "is protected within this context"),
    ("SlotId mix(BlockId id) { return id; }", "cannot convert"),
)

CONTROLS = (
    "Waiting moved(Waiting&& s) { return std::move(s); }",
    "Retracting kept(Decoding&& s) { return on(std::move(s), Preempt{}); }",
    "bool taken(BlockPool& pool) { const auto block = pool.take(); return block.has_value(); }",
    "Filled proof(const LandedStep& step, const Row& row) { return step.filled(row); }",
    "Landed proof(const StepLedger& steps) { return steps.landed(); }",
)

VISIT = """
#include "transitions.h"
using namespace tokenspeed;
int visit(const RequestState& s) {{
  return std::visit(Overloaded{{
      [](const Waiting&) {{ return 1; }},
      [](const Running&) {{ return 2; }},
      [](const Draining&) {{ return 3; }},
      {last}
  }}, s);
}}
"""


def compile_errors(source: str) -> dict[int, str]:
    """The compiler's errors by line of `source`; errors elsewhere have the line 0."""
    assert COMPILER is not None
    command = [COMPILER, "-std=c++20", "-fsyntax-only", "-fmax-errors=0", "-Werror=unused-result"]
    done = subprocess.run(
        [*command, f"-I{CSRC}", "-x", "c++", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    errors: dict[int, str] = defaultdict(str)
    for place, line, message in re.findall(r"^(.*?):(\d+):\d+: error: (.*)$", done.stderr, re.MULTILINE):
        errors[int(line) if place == "<stdin>" else 0] += message + "\n"
    assert (done.returncode != 0) == bool(errors), done.stderr
    return dict(errors)


def pair_lines(states: dict[str, set[str]], events: tuple[str, ...]) -> list[tuple[str, bool]]:
    """One line for each pair and each way to pass the state, and whether it must compile in one of the two."""
    lines = []
    for state, legal in states.items():
        for event in events:
            for number, passing in enumerate(("std::move(s)", "s")):
                name = f"{state}_{event}_{number}"
                line = f"void {name}({state}&& s, {event}&& e) {{ (void)on({passing}, std::move(e)); }}"
                lines.append((line, event in legal))
    return lines


def test_exactly_the_legal_pairs_of_state_and_event_compile() -> None:
    header = ['#include "transitions.h"', "using namespace tokenspeed;"]
    pairs = pair_lines(LEGAL, EVENTS) + pair_lines(LEGAL_BLOCK, BLOCK_EVENTS)
    errors = compile_errors("\n".join(header + [line for line, _ in pairs]))
    assert 0 not in errors
    for at in range(0, len(pairs), 2):
        by_value, by_reference = (errors.get(len(header) + 1 + at + i) for i in range(2))
        line, legal = pairs[at]
        if legal:
            assert by_value is None or by_reference is None, f"a legal pair does not compile: {line}: {by_value}"
        else:
            assert by_value is not None and by_reference is not None, f"an illegal pair compiles: {line}"
            assert NO_OVERLOAD in by_value and NO_OVERLOAD in by_reference, (line, by_value, by_reference)


def test_copies_dropped_states_and_forged_proofs_do_not_compile() -> None:
    header = ['#include "transitions.h"', "using namespace tokenspeed;"]
    errors = compile_errors("\n".join([*header, *(line for line, _ in MISUSES), *CONTROLS]))
    first = len(header) + 1
    for number, (line, message) in enumerate(MISUSES, first):
        assert message in errors.get(number, ""), f"{line}: {errors.get(number)}"
    assert set(errors) == set(range(first, first + len(MISUSES))), "a control does not compile"


def test_a_visit_that_forgets_a_state_does_not_compile() -> None:
    complete = VISIT.format(last="[](const Finished&) { return 4; },")
    assert compile_errors(complete) == {}
    assert compile_errors(VISIT.format(last=""))
