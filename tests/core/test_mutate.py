"""The mutation run's operators: each makes the fault that it names, and nothing but it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.core.mutate import MOVES_NOTHING, Verdict, draw, kill_rate, table
from tests.core.mutations import OPERATORS, Mutant, blank, mutants

CSRC = Path(__file__).parents[2] / "csrc"

SOURCE = """
namespace pool {
class List {
 public:
  std::int32_t size() const { return size_ + 1; }
  void push(Item& item) {
    item.previous = last_;
    last_ = &item;  // and ++size_;
    ++size_;
    index_[at] = -1;
    if (size_ > 8 && grows) return;
    if (item.held) {
      held_ += 1;
    }
    visit(Overloaded{[&](Held& held) { drop(held); }, [](Free&) { return true; }}, item);
    Pool* pool = std::exchange(pool_, nullptr);
    return on(std::move(item), Hit{});
  }
  std::vector<Item*> items_ = {};
};
}
"""

EXPECTED = {
    ("drop", "item.previous = last_;", ";"),
    ("drop", "last_ = &item;", ";"),
    ("drop", "++size_;", ";"),
    ("drop", "index_[at] = -1;", ";"),
    ("drop", "held_ += 1;", ";"),
    ("drop", "drop(held);", ";"),
    ("drop", "visit(Overloaded{[&](Held& held) { drop(held); }, [](Free&) { return true; }}, item);", ";"),
    ("swap", "item.previous = last_;\n    last_ = &item;", "last_ = &item;\n    item.previous = last_;"),
    ("negate", "size_ > 8 && grows", "!(size_ > 8 && grows)"),
    ("negate", "item.held", "!(item.held)"),
    ("always", "item.held", "true"),
    ("unguard", "if (size_ > 8 && grows) return;", ";"),
    ("compare", ">", ">="),
    ("constant", "8", "9"),
    ("constant", "1", "0"),
    ("constant", "1", "2"),
    ("count", "++", "--"),
    ("count", "+=", "-="),
    ("keep", "std::exchange(pool_, nullptr)", "pool_"),
    ("keep", "std::move(item)", "item"),
    ("answer", "true", "false"),
}


def test_every_operator_makes_its_fault() -> None:
    """Comments, members, declarations and functions that change nothing stay as they are."""
    made = {(mutant.operator, mutant.before, mutant.after) for mutant in mutants("list.h", SOURCE)}
    assert made == EXPECTED
    assert {operator for operator, _, _ in made} == set(OPERATORS)


def test_statements_that_do_not_touch_each_other_are_not_swapped() -> None:
    statements = ["block.kind = kFree;", "block.next = kNone;", "free_.push_back(id);", "used_.push_back(id);"]
    source = "\n  ".join(["void f() {", *statements]) + "\n}\n"
    assert [mutant.operator for mutant in mutants("f.cc", source)] == ["drop"] * 4


@pytest.mark.parametrize("path", sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cc")]), ids=lambda path: path.name)
def test_a_mutant_changes_one_line_or_swaps_two_and_closes_its_brackets(path: Path) -> None:
    text = path.read_text()
    for mutant in mutants(path.name, text):
        after = mutant.apply(text)
        lines, changed = text.split("\n"), after.split("\n")
        different = [number for number, pair in enumerate(zip(lines, changed, strict=True), 1) if pair[0] != pair[1]]
        assert different == ([mutant.line, mutant.line + 1] if mutant.operator == "swap" else [mutant.line])
        code = Counter(blank(after))
        assert code["("] == code[")"] and code["{"] == code["}"] and code["["] == code["]"], mutant


def test_a_drawing_is_the_same_for_the_same_seed_and_as_large_as_asked() -> None:
    drawn, of_all = draw(200, seed=3)
    assert len(drawn) == len(set(drawn)) == 200 < of_all
    assert (drawn, of_all) == draw(200, seed=3)
    assert drawn != draw(200, seed=4)[0]
    assert {mutant.operator for mutant in drawn} == set(OPERATORS)
    assert not {mutant.file for mutant in drawn} & set(MOVES_NOTHING)
    assert {mutant.file for mutant in draw(10, seed=3, only=["queue.h"])[0]} == {"queue.h"}


def test_the_files_that_are_left_out_exist() -> None:
    assert {name for name in MOVES_NOTHING if not (CSRC / name).is_file()} == set()


def test_the_kill_rate_counts_only_mutants_that_can_be_told_apart() -> None:
    assert kill_rate(Counter({"stillborn": 5, "same code": 5, "drive": 2, "oracle": 1, "survived": 1})) == 0.75
    assert kill_rate(Counter()) == 1.0
    mutant = Mutant("queue.h", 1, "drop", 0, 1, "a", "b")
    shown = table([Verdict(mutant, "drive", "torn"), Verdict(mutant, "survived", "")])
    assert shown.splitlines()[-1].split() == ["all", "0", "0", "1", "0", "0", "1", "50.0%"]
