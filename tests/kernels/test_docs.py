"""docs/kernels.md says which backend implements which op."""

from __future__ import annotations

import re
from pathlib import Path

from tokenspeed.kernels.registry import OPS
from tokenspeed.kernels.selection import default

DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_the_tables_of_ops_are_the_registry() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([a-z, ]+) \|$", DOCS.read_text(), flags=re.MULTILINE)
    written = {op: set(backends.split(", ")) for op, backends in rows}
    assert written == {op: {each.backend for each in default().registry.of(op)} for op in OPS}
    assert len(rows) == len(OPS)
