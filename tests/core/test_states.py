"""What must not compile does not: each illegal line is given to the compiler, and its message is read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from tests.core.states import CSRC, PAGE, TABLE, Row, page, read_table

COMPILER = shutil.which("g++")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++, whose messages are read")

TABLES = read_table(TABLE.read_text())
ROWS = [row for table in TABLES.values() for row in table.rows]
ILLEGAL = [pair for table in TABLES.values() for pair in table.illegal()]
GIVING = [row for row in ROWS if row.result != "void"]
REQUESTS = TABLES["request"]

NO_OVERLOAD = "no matching function for call to 'on("
NO_FUNCTION = "no matching function for call to"
PRIVATE = "is private within this context"
PROTECTED = "is protected within this context"
DELETED = "use of deleted function"
DROPPED = "ignoring return"
NOT_BOUND = "cannot bind"
NOT_INVOCABLE = "no type named 'type' in 'struct std::invoke_result<tokenspeed::Overloaded<"

MISUSES = {
    "a slot is copied": ("void f(Slot& a) { Slot b = a; }", DELETED),
    "a block table is copied": ("void f(BlockTable& a) { BlockTable b = a; }", DELETED),
    "a slot is assigned over another": ("void f(Slot& a, Slot& b) { a = std::move(b); }", DELETED),
    "a taken block is dropped": ("void f(BlockPool& pool) { pool.take(); }", DROPPED),
    "a hit is dropped": ("void f(BlockPool& pool) { pool.hit(BlockId{0}); }", DROPPED),
    "a block gets a second writer by its id": (
        "WritableBlock f(BlockPool& pool) { return WritableBlock(pool, BlockId{0}); }", PRIVATE),
    "a block gets a second writer through a table": (
        "void f(BlockTable& table, WritableBlock&& block) { table.append(std::move(block)); }", NO_FUNCTION),
    "a table's block is moved out of it": (
        "BlockTable::Entry f(const BlockTable& table) { return table.entries()[0]; }", DELETED),
    "a block is given back by hand": ("void f(BlockPool& pool) { pool.let_go(BlockId{0}); }", PRIVATE),
    "a free block is given back by hand": ("void f(BlockPool& pool) { pool.put_free(BlockId{0}); }", PRIVATE),
    "a slot is given back by hand": ("void f(SlotPool& slots) { slots.give_back(SlotId{0}); }", PRIVATE),
    "a block is published by hand": (
        "void f(BlockPool& pool, const Hash& hash) { pool.index(hash, BlockId{0}); }", PRIVATE),
    "an unfilled block is sealed": ("Seal f(const BlockContent& content) { return Seal(content); }", PRIVATE),
    "blocks are sealed by a number": (
        "void f(BlockTable& table, const Sequence& sequence) { table.seal(64, sequence); }", "cannot convert"),
    "a filling is claimed": ("Filled f() { return Filled(64); }", PRIVATE),
    "a landed step is claimed": ("LandedStep f(const std::vector<Row>& rows) { return LandedStep(rows); }", PRIVATE),
    "a landing is claimed": ("Landed f() { return Landed(StepId{7}); }", PRIVATE),
    "a request finishes before its steps have landed": (
        "Finished f(Decoding&& state) { return on(std::move(state), Finish{}); }", "could not convert"),
    "a request is finished out of nothing": ("Finished f() { return Finished(); }", PRIVATE),
    "a block that a step may write is taken from its request": (
        "BlockTable f(Draining&& state) { return std::move(state.table_); }", PROTECTED),
    "a slot that a step may write is taken from its request": (
        "Slot f(Retracting&& state) { return std::move(state.slot_); }", PROTECTED),
    "a block is taken from a table that a step may write": (
        "BlockTable f(Draining&& state) { return std::move(state.table()); }", DELETED),
    "the end of a copy is claimed": ("Copied f() { return Copied(); }", PRIVATE),
    "the failure of a copy is claimed": ("CopyFailed f() { return CopyFailed(); }", PRIVATE),
    "a block goes into a table while it is being loaded": (
        "void f(BlockTable& table, LoadingBlock&& block) { table.append(std::move(block)); }", NO_FUNCTION),
    "a block arrives while it is being loaded": (
        "void f(Fetching& s, LoadingBlock&& block) { on(s, Arrive{0, std::move(block)}); }", "could not convert"),
    "a block is offloaded into a place that holds another": (
        "OffloadingBlock f(CachedBlock&& block, HostBlock&& room) {"
        " return on(std::move(block), Offload{std::move(room)}); }", "could not convert"),
    "a copy begins with a block that nothing pins": (
        "TicketId f(CopyLedger& copies, CachedBlock&& block) { return copies.begin(std::move(block)); }", NO_FUNCTION),
    "a block's id is taken for a place's on the host": ("HostId f(BlockId id) { return id; }", "cannot convert"),
    "a block's id is taken for a slot's": ("SlotId f(BlockId id) { return id; }", "cannot convert"),
}  # fmt: skip

CONTROLS = {
    "a slot is moved": "Slot f(Slot&& a) { return std::move(a); }",
    "a block table is moved": "BlockTable f(BlockTable&& a) { return std::move(a); }",
    "a taken block is kept": "bool f(BlockPool& pool) { const auto block = pool.take(); return block.has_value(); }",
    "a free block goes into a table": "void f(BlockTable& t, FreeBlock&& block) { t.append(std::move(block)); }",
    "a sealed block goes into a table": "void f(BlockTable& t, SealedBlock&& block) { t.append(std::move(block)); }",
    "a table is read": "BlockId f(const Draining& state) { return state.table()[0]; }",
    "blocks are sealed by a proof": "void f(BlockTable& t, Filled p, const Sequence& s) { t.seal(p, s); }",
    "a landed step gives its proof": "Filled f(const LandedStep& step, const Row& r) { return step.filled(r); }",
    "the ledger gives its proof": "Landed f(const StepLedger& steps) { return steps.landed(); }",
    "a loaded block arrives": "void f(Fetching& s, SealedBlock&& block) { on(s, Arrive{0, std::move(block)}); }",
    "a block is offloaded": (
        "OffloadingBlock f(CachedBlock&& block, FreeHostBlock&& room) {"
        " return on(std::move(block), Offload{std::move(room)}); }"
    ),
    "a copy begins": "TicketId f(CopyLedger& c, OffloadingBlock&& block) { return c.begin(std::move(block)); }",
    "a request drains": "Draining f(Decoding&& state) { return on(std::move(state), Finish{}); }",
}


PASSINGS = ("s", "std::move(s)", "std::as_const(s)")


def pass_to(state: str, event: str, passing: str, use: str = "(void)") -> str:
    return f"void f({state}& s, {event}& e) {{ {use}on({passing}, std::move(e)); }}"


def visit(forgotten: str = "") -> str:
    lambdas = ", ".join(f"[](const {state}&) {{ return 1; }}" for state in REQUESTS.states if state != forgotten)
    return f"int f(const RequestState& s) {{ return std::visit(Overloaded{{{lambdas}}}, s); }}"


def snippets() -> dict[str, str]:
    """Everything that is given to the compiler, one line each, by name."""
    made = {f"{state} {event} {how}": pass_to(state, event, how) for state, event in ILLEGAL for how in PASSINGS}
    for row in ROWS:
        name = f"{row.state} {row.event}"
        made |= {f"{name} {how}": pass_to(row.state, row.event, how) for how in ("s", "std::move(s)")}
        right = "std::move(s)" if row.passing == "moves" else "s"
        made[f"{name} dropped"] = pass_to(row.state, row.event, right, use="")
    for state in [state for table in TABLES.values() for state in table.states]:
        made[f"{state} copied"] = f"{state} f({state}& s) {{ return s; }}"
        made[f"{state} moved"] = f"{state} f({state}&& s) {{ return std::move(s); }}"
    made |= {f"visit without {state}": visit(forgotten=state) for state in REQUESTS.states}
    made["visit"] = visit()
    return made | {name: line for name, (line, _) in MISUSES.items()} | CONTROLS


def compile_errors(source: str, *flags: str) -> dict[tuple[str, int], str]:
    """The compiler's errors by file name and line; the file name of `source` is empty.

    An error in a template counts where the template was asked for, one in a macro where the macro was written.
    """
    assert COMPILER is not None
    command = [COMPILER, "-std=c++20", "-fsyntax-only", "-fmax-errors=0", "-fno-diagnostics-show-caret"]
    done = subprocess.run(
        [*command, "-Werror=unused-result", *flags, "-x", "c++", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    errors: dict[tuple[str, int], str] = defaultdict(str)
    asked_for = ("?", 0)
    for line in done.stderr.splitlines():
        found = re.match(r"(.*?):(\d+):\d+: +(error: |required from here|note: in expansion of macro)(.*)", line)
        if not found:
            continue
        place = ("" if found[1] == "<stdin>" else Path(found[1]).name, int(found[2]))
        if found[3] == "required from here":
            asked_for = place
        else:
            errors[place if place[0] in {"", TABLE.name} else asked_for] += found[4] + "\n"
    assert (done.returncode != 0) == bool(errors), done.stderr
    return dict(errors)


@pytest.fixture(scope="module")
def messages() -> dict[str, str]:
    """What the compiler says of each snippet, all compiled in one unit; an empty text: nothing."""
    header = ['#include "copies.h"', '#include "transitions.h"', "namespace tokenspeed {"]
    lines = [f"namespace n{number} {{ {line} }}" for number, line in enumerate(snippets().values())]
    errors = compile_errors("\n".join([*header, *lines, "}"]), f"-I{CSRC}")
    by_name = {name: errors.pop(("", line), "") for line, name in enumerate(snippets(), len(header) + 1)}
    assert errors == {}, "an error outside the lines"
    return by_name


def names(source: str) -> set[str]:
    return set(re.findall(r"\w+", source))


@needs_compiler
@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_an_illegal_pair_does_not_compile(messages: dict[str, str], state: str, event: str) -> None:
    for how in PASSINGS:
        message = messages[f"{state} {event} {how}"]
        assert message.count("\n") == 1 and message.startswith(NO_OVERLOAD), message
        assert {state, event} <= set(re.findall(r"\w+", message)), message
    # No misspelt name: the state is moved, and the event legally used, in lines of the same unit that compile.
    (legal, *_) = (row for row in ROWS if row.event == event)
    right = "std::move(s)" if legal.passing == "moves" else "s"
    assert messages[f"{state} moved"] == messages[f"{legal.state} {event} {right}"] == ""


@needs_compiler
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.state}-{row.event}")
def test_a_legal_pair_compiles_and_only_as_the_table_passes_its_state(messages: dict[str, str], row: Row) -> None:
    right, wrong = ("std::move(s)", "s") if row.passing == "moves" else ("s", "std::move(s)")
    assert messages[f"{row.state} {row.event} {right}"] == ""
    assert NOT_BOUND in messages[f"{row.state} {row.event} {wrong}"]


@needs_compiler
@pytest.mark.parametrize("row", GIVING, ids=lambda row: f"{row.state}-{row.event}")
def test_what_an_event_gives_cannot_be_dropped(messages: dict[str, str], row: Row) -> None:
    assert DROPPED in messages[f"{row.state} {row.event} dropped"]


@needs_compiler
@pytest.mark.parametrize("state", [state for table in TABLES.values() for state in table.states])
def test_a_state_is_moved_and_never_copied(messages: dict[str, str], state: str) -> None:
    assert messages[f"{state} moved"] == ""
    assert DELETED in messages[f"{state} copied"]


@needs_compiler
@pytest.mark.parametrize("state", REQUESTS.states)
def test_a_visit_that_forgets_a_state_does_not_compile(messages: dict[str, str], state: str) -> None:
    assert NOT_INVOCABLE in messages[f"visit without {state}"]
    assert messages["visit"] == ""


@needs_compiler
@pytest.mark.parametrize("name", MISUSES)
def test_it_does_not_compile_that(messages: dict[str, str], name: str) -> None:
    assert MISUSES[name][1] in messages[name]


@needs_compiler
@pytest.mark.parametrize("name", CONTROLS)
def test_it_compiles_that(messages: dict[str, str], name: str) -> None:
    assert messages[name] == ""


# --- the proofs inside the extension ---


@needs_compiler
def test_the_proofs_hold() -> None:
    assert compile_errors('#include "proofs.h"', f"-I{CSRC}") == {}
    assert any('#include "proofs.h"' in path.read_text() for path in CSRC.glob("*.cc")), "no part of the extension"


@needs_compiler
def test_the_proofs_fail_at_each_row_that_is_wrong(tmp_path: Path) -> None:
    wrong = {
        "REQUEST(Waiting, Admit, moves,": ("Prefilling)", "Decoding)"),
        "REQUEST(Prefilling, Fill,": ("keeps", "moves"),
        "BLOCK(WritableBlock, Seal,": ("moves", "keeps"),
        "BLOCK(CachedBlock, Hit,": ("CachedBlock, Hit", "FreeBlock, Evict"),
    }
    lines = TABLE.read_text().splitlines()
    numbers = []
    for beginning, (old, new) in wrong.items():
        (number,) = (i for i, line in enumerate(lines) if line.startswith(beginning))
        assert old in lines[number]
        lines[number] = lines[number].replace(old, new)
        numbers.append(number + 1)
    (tmp_path / TABLE.name).write_text("\n".join(lines))
    shutil.copy(CSRC / "proofs.h", tmp_path)
    errors = compile_errors('#include "proofs.h"', f"-I{tmp_path}", f"-I{CSRC}")
    assert {line for file, line in errors if file == TABLE.name} == set(numbers)
    # And the row that is gone: its overload is there.
    assert "".join(errors.values()).count("has an overload but no row") == 1


@needs_compiler
def test_the_proofs_fail_for_an_overload_without_a_row() -> None:
    overload = "namespace tokenspeed { void on(const Finished&, Abort); }"
    errors = compile_errors(f'#include "transitions.h"\n{overload}\n#include "proofs.h"', f"-I{CSRC}")
    assert "has an overload but no row" in "".join(errors.values())


# --- the table ---


def test_the_headers_declare_the_pairs_of_the_table_and_no_other() -> None:
    text = "".join(path.read_text() for path in sorted(CSRC.glob("*.h")))
    declared = re.findall(r"\bon\((?:const )?(\w+)&{1,2}(?: \w+)?, (?:const )?(\w+)&{0,2}(?: \w+)?\)", text)
    assert set(declared) == {(row.state, row.event) for row in ROWS}
    handles = re.findall(r"class \[\[nodiscard\]\] (\w+) : public (?:Block|Host)Handle", text)
    assert set(handles) == set(TABLES["block"].states)


def test_the_page_shows_the_table() -> None:
    assert PAGE.read_text() == page(TABLES), "run python -m tests.core.states --write"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('REQUEST(Waiting, Admit, moves, "it", Prefilling)', "come twice"),
        ('REQUEST(Waiting, Seal, moves, "it", Prefilling)', "no event of a request"),
        ('BLOCK(SealedBlock, Hit, moves, "it", void)', "names no state"),
        ('BLOCK(SealedBlock, Hit, copies, "it", SealedBlock)', "cannot be read"),
        ('BLOCK_STATE(SealedBlock, "again")', "comes twice"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(line: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_table(TABLE.read_text() + line + "\n")
