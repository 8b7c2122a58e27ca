"""The list of supported models in docs/models.md is the registry, and each row is compared with `transformers`."""

from __future__ import annotations

import re
from pathlib import Path

from tests.models.families import FAMILIES
from tokenspeed.models.registry import ARCHITECTURES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


def rows() -> dict[str, list[str]]:
    """Architecture → the names under which it is compared."""
    found = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", PAGE.read_text(), flags=re.MULTILINE)
    return {architecture: re.findall(r"`([^`]+)`", names) for architecture, names in found}


def test_the_page_lists_what_the_registry_has() -> None:
    assert set(rows()) == set(ARCHITECTURES)


def test_each_row_names_its_comparisons_and_none_is_left_out() -> None:
    named = [name for names in rows().values() for name in names]
    assert all(rows().values())
    assert sorted(named) == sorted([*FAMILIES, "llama", "kimi-k2.5"])
    for architecture, names in rows().items():
        for name in set(names) & set(FAMILIES):
            assert FAMILIES[name].model.__name__ == architecture
