"""The house: an import goes down its floors, never up, and never sideways between the two planes.

`python -m tests.house.test_floors` prints every package with its floor and what it imports.
"""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tokenspeed"

FLOORS = {
    "__main__": 7,
    "entrypoints": 6,
    "bench": 6,
    "simulate": 6,
    "engine": 5,
    "text": 5,
    "_core": 4,
    "executor": 4,
    "models": 3,
    "checkpoint": 3,
    "layers": 2,
    "parallel": 1,
    "kernels": 0,
    "config": -1,
    "errors": -1,
    "request": -1,
    "batch": -1,
    "logs": -1,
}
SIDEWAYS = {("engine", "text"), ("bench", "entrypoints"), ("bench", "simulate"), ("models", "checkpoint")}
"""The only neighbours on one floor that may see each other: the engine's face detokenizes, a model is
built from what its checkpoint says, a benchmark counts sliding seconds as the simulator does."""

ROOF = max(FLOORS.values())
"""Where a program (`__main__.py`) stands, whatever it is about: it may import anything, because nothing imports it."""

TORCH_FREE = ("text", "entrypoints", "bench", "simulate", "_core", "parallel")
BETWEEN_PROCESSES = {"alone.py", "collectives.py", "groups.py", "measure.py", "symmetric.py", "world.py"}
"""What moves tensors between ranks, or makes up what others would have sent; the rest of `parallel` is a compiler that
only knows their shapes."""


def files() -> Iterator[tuple[str, Path]]:
    """Every module with the part of the house it belongs to."""
    for path in sorted(PACKAGE.rglob("*.py")):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part != "__init__":
            yield part, path
    if not (PACKAGE / "kernels" / "__init__.py").is_file():
        raise AssertionError("tokenspeed/kernels is not there")
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path


def imports(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, at any depth of it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
            names.add(node.module)
    return names


def parts(path: Path) -> set[str]:
    """The parts of the house that a file imports."""
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("tokenspeed.")}
    return ours & set(FLOORS)


@pytest.mark.parametrize(("part", "path"), list(files()), ids=lambda value: str(value).removeprefix(str(ROOT)))
def test_imports_go_down(part: str, path: Path) -> None:
    assert part in FLOORS, f"{path} is on no floor"
    floor = ROOF if path.name == "__main__.py" else FLOORS[part]
    for other in parts(path) - {part}:
        allowed = FLOORS[other] < floor or floor == FLOORS[other] == -1 or (part, other) in SIDEWAYS
        assert allowed, f"{path} (floor {floor}) imports {other} (floor {FLOORS[other]})"


def test_nothing_imports_a_program() -> None:
    for _, path in files():
        assert not any(name.endswith("__main__") for name in imports(path)), path


def test_kernels_import_nothing_of_ours() -> None:
    for part, path in files():
        if part == "kernels":
            assert parts(path) <= {"kernels"}, path


def test_the_control_plane_includes_neither_cuda_nor_python() -> None:
    sources = [path for path in (ROOT / "csrc").iterdir() if path.suffix in {".h", ".cc"}]
    assert sources
    for path in sources:
        for line in path.read_text().splitlines():
            if line.startswith("#include"):
                assert "Python.h" not in line and "cuda" not in line and "torch" not in line, f"{path}: {line}"


@pytest.mark.parametrize("part", TORCH_FREE)
def test_torch_is_not_named(part: str) -> None:
    for owner, path in files():
        if owner == part and not (part == "parallel" and path.name in BETWEEN_PROCESSES):
            assert not any(name.split(".")[0] == "torch" for name in imports(path)), path


def test_the_front_end_process_never_loads_torch() -> None:
    code = (
        "import sys; import tokenspeed.entrypoints.api, tokenspeed.engine.async_engine, tokenspeed.text.load; "
        "import tokenspeed.entrypoints.grpc.server, tokenspeed.entrypoints.fleet; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'triton', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_module_imports_alone() -> None:
    modules = [
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for part, path in files()
        if path.name != "__main__.py"
    ]
    modules = [f"tokenspeed.{name}" if name.startswith("kernels") else name for name in modules]
    if importlib.util.find_spec("triton") is None:
        on_gpu = ("tokenspeed.kernels.triton.", "tokenspeed.kernels.hopper.", "tokenspeed.kernels.library.")
        modules = [name for name in modules if not name.startswith(on_gpu)]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH_ALONE, *modules], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Third-party packages are loaded once; each of our modules is then the first of ours in its own process.
IMPORT_EACH_ALONE = """
import importlib, os, sys, traceback
import aiohttp, numpy, torch
bad = 0
for name in sys.argv[1:]:
    assert not any(loaded.startswith("tokenspeed.") for loaded in sys.modules)
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            print(name, flush=True)
            os._exit(1)
        os._exit(0)
    bad += os.waitpid(child, 0)[1] != 0
sys.exit(bad != 0)
"""


def main() -> None:
    """Print the house as the files build it."""
    seen: dict[str, set[str]] = {}
    for part, path in files():
        seen.setdefault(part, set()).update(parts(path) - {part})
    for part in sorted(seen, key=lambda name: (-FLOORS[name], name)):
        below = sorted(seen[part], key=lambda name: (-FLOORS[name], name))
        print(f"{FLOORS[part]:>2}  {part:12} → {', '.join(below) or '(nothing of ours)'}")


if __name__ == "__main__":
    main()
