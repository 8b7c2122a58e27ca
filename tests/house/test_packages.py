"""What an installed TokenSpeed consists of: only who installs it misses a package that pyproject.toml forgets."""

from __future__ import annotations

import tomllib

from tests.house.test_floors import PACKAGE, ROOT


def test_pyproject_names_every_package() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = [path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")]
    kernels = [path.parent.relative_to(ROOT) for path in (ROOT / "kernels").rglob("__init__.py")]
    found = {".".join(folder.parts) for folder in folders} | {".".join(("tokenspeed", *each.parts)) for each in kernels}
    assert sorted(named) == sorted(found)
