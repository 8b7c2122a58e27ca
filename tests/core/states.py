"""The table of states, read from `csrc/transitions.inc`, and the page that shows it.

`python -m tests.core.states` prints how many pairs are legal and illegal and how many tests must not compile;
with `--write` it writes `docs/states.md`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
TABLE = CSRC / "transitions.inc"
PAGE = ROOT / "docs" / "states.md"

NAMED = re.compile(r'(\w+), "([^"]*)"')
PAIR = re.compile(r'(\w+), (\w+), (moves|keeps), "([^"]*)", (.+)')
RELEASE = re.compile(r'(\w+), "([^"]*)", (\w+)')


@dataclass(frozen=True)
class Row:
    """One legal pair. `passing` is "moves" (the event consumes the state) or "keeps"; `result` is a C++ type."""

    state: str
    event: str
    passing: str
    moved: str
    result: str


@dataclass
class Machine:
    """The states of one kind of thing, what can happen to it, and every legal pair of the two, in table order."""

    kind: str
    states: dict[str, str] = field(default_factory=dict)  # name → what it owns
    events: dict[str, str] = field(default_factory=dict)  # name → what has happened
    rows: list[Row] = field(default_factory=list)
    releases: list[tuple[str, str, str]] = field(default_factory=list)  # state, when, where its destructor leaves it

    def illegal(self) -> list[tuple[str, str]]:
        legal = {(row.state, row.event) for row in self.rows}
        return [(state, event) for state in self.states for event in self.events if (state, event) not in legal]

    def next_states(self, row: Row) -> list[str]:
        """The states in which the event can leave what it has happened to."""
        if row.passing == "keeps":
            return [row.state]
        return [name for name in dict.fromkeys(re.findall(r"\w+", row.result)) if name in self.states]


def read_table(text: str) -> dict[str, Machine]:
    """The machines "request" and "block". ValueError for a row that makes no sense; proofs.h checks the rest."""
    machines = {kind: Machine(kind) for kind in ("request", "block")}
    for found in re.finditer(r"^(REQUEST|BLOCK)(_STATE|_EVENT|_RELEASE|)\((.*?)\)$", text, re.MULTILINE | re.DOTALL):
        try:
            read_row(machines[found[1].lower()], found[2], " ".join(found[3].split()))
        except ValueError as error:
            raise ValueError(f"line {text.count(chr(10), 0, found.start()) + 1} of the table: {error}") from error
    return machines


def read_row(machine: Machine, macro: str, arguments: str) -> None:
    match = {"_STATE": NAMED, "_EVENT": NAMED, "_RELEASE": RELEASE, "": PAIR}[macro].fullmatch(arguments)
    if not match:
        raise ValueError(f"cannot be read: {arguments}")
    if macro in {"_STATE", "_EVENT"}:
        names = machine.states if macro == "_STATE" else machine.events
        if match[1] in names:
            raise ValueError(f"{match[1]} comes twice")
        names[match[1]] = match[2]
    elif macro == "_RELEASE":
        machine.releases.append((match[1], match[2], match[3]))
    else:
        row = Row(*match.groups())
        if row.state not in machine.states or row.event not in machine.events:
            raise ValueError(f"{row.state} is no state or {row.event} is no event of a {machine.kind}")
        if any((row.state, row.event) == (other.state, other.event) for other in machine.rows):
            raise ValueError(f"{row.state} and {row.event} come twice")
        if not machine.next_states(row):
            raise ValueError(f"{row.result} names no state of a {machine.kind}")
        machine.rows.append(row)


# --- the page ---

INTRODUCTION = """\
# States

What a request and a KV block can be, and what can happen to them in each state. This page is made from
`csrc/transitions.inc` by `python -m tests.core.states --write`; a test holds the two equal.

Each state is a C++ type that can only be moved and owns exactly what may be used in it. Each event is a type that
carries what it brings in. For each legal pair of the two there is one overload of `on(state, event)`, and for no
other pair is there any: what is not on this page does not compile.

- {legal} pairs are legal. `csrc/proofs.h` proves for each that its overload exists, gives exactly the result below
  and takes the state as the table says, whenever the extension is built.
- {illegal} pairs are illegal. `csrc/proofs.h` proves that no overload takes them, and that no request knows a
  block's event or the reverse. `tests/core/test_states.py` gives each to the compiler and reads its message.
"""

PROMISES = """\
## What else does not compile

- copying a state, a slot or a block: none can be used, or given back, twice;
- dropping what an event gives;
- a visit that forgets a state;
- a second writer: a block has one `WritableBlock`, and a table takes a block only when it is free or sealed;
- giving back a block or a slot by hand: destructors do it, once;
- publishing a block that is not filled: `Seal` is made by a block table from `Filled`, and only a landed step
  gives `Filled`;
- handing out memory that a launched step may write: it lies in `Retracting` or `Draining` until `Land`, and only
  the ledger of steps gives the proof `Landed`;
- reading or reusing either end of a copy that is under way: `OffloadingBlock` and `LoadingBlock` hold both until
  `Copied` or `CopyFailed`, and only the ledger of copies makes these.

Using a state after it was moved compiles. `scripts/lint_cpp.sh` (clang-tidy) refuses it, and a test shows that it
does.

## Where the promise of the compiler ends

- **Ids from outside**, of requests and of copies, are numbers. Each is looked up once, at the door; from there on a
  state is held. An id that is unknown or has ended is a typed answer, not a transition.
- **What somebody else has done.** A share of a block, or a copy of it, does not know that another holder has
  withdrawn the block meanwhile. The pools keep that, and look it up when a share is let go and when a copy ends.
- **Which step, which ticket.** `Land`, `Fill` and `Copied` carry a proof that a step or a copy has ended, not whose
  it was. The ledgers keep which row and which ticket belong to which request.
- **Numbers inside a state**: how many tokens are computed, or awaited.

`check()` recounts what the compiler cannot see: after every step under `TOKENSPEED_DEBUG=1`, after every call in the
fuzz tests.
"""


def diagram(machine: Machine) -> str:
    """A mermaid state diagram: one edge for each pair of states, with all that leads from one to the other."""
    edges: dict[tuple[str, str], list[str]] = {}
    for row in machine.rows:
        for after in machine.next_states(row):
            edges.setdefault((row.state, after), []).append(row.event)
    for state, _, left in machine.releases:
        if state != left and "released" not in edges.setdefault((state, left), []):
            edges[state, left].append("released")
    lines = [f"    {before} --> {after}: {', '.join(labels)}" for (before, after), labels in edges.items()]
    left_by = {before for before, after in edges if before != after}
    ends = [f"    {state} --> [*]" for state in machine.states if state not in left_by]
    begin = f"    [*] --> {next(iter(machine.states))}"
    return "\n".join(["```mermaid", "stateDiagram-v2", begin, *lines, *ends, "```"])


def markdown_table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def section(machine: Machine) -> str:
    pairs = [
        (row.state, row.event, row.passing, f"`{row.result}`" if row.result != "void" else "", row.moved)
        for row in machine.rows
    ]
    parts = [
        f"## {machine.kind.capitalize()}s",
        diagram(machine),
        markdown_table(("state", "owns"), machine.states.items()),
        markdown_table(("event", "what has happened"), machine.events.items()),
        markdown_table(("state", "event", "the state", "gives", "what moves"), pairs),
        f"{len(machine.rows)} legal pairs, {len(machine.illegal())} illegal ones.",
    ]
    if machine.releases:
        parts += [
            "A state that goes out of scope gives its block back:",
            markdown_table(("state", "when", "the block is then"), machine.releases),
        ]
    return "\n\n".join(parts) + "\n"


def page(machines: dict[str, Machine]) -> str:
    legal = sum(len(machine.rows) for machine in machines.values())
    illegal = sum(len(machine.illegal()) for machine in machines.values())
    sections = [section(machine) for machine in machines.values()]
    return "\n".join([INTRODUCTION.format(legal=legal, illegal=illegal), *sections, PROMISES])


def num_must_fail_tests() -> int:
    """How many tests pytest collects of those that must not compile."""
    tests = "tests/core/test_states.py"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", tests, "-k", "an_illegal_pair_does_not_compile"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return sum(line.startswith(tests) for line in done.stdout.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/states.md")
    options = parser.parse_args()
    machines = read_table(TABLE.read_text())
    for machine in machines.values():
        print(
            f"{machine.kind}: {len(machine.states)} states × {len(machine.events)} events: "
            f"{len(machine.rows)} legal pairs, {len(machine.illegal())} illegal pairs"
        )
    print(f"{num_must_fail_tests()} tests of pairs that must not compile")
    if options.write:
        PAGE.write_text(page(machines))
        print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
