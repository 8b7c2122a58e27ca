"""Random calls against the C++ core without Python, under the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++20", "-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_random_calls_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    assert COMPILER is not None
    # One translation unit: the headers are parsed once, which halves the time.
    sources = [*sorted(CSRC.glob("*.cc")), HERE / "drive.cc"]
    unit = tmp_path / "unit.cc"
    unit.write_text("".join(f'#include "{source}"\n' for source in sources))
    program = tmp_path / "drive"
    subprocess.run([COMPILER, *FLAGS, f"-I{CSRC}", str(unit), "-o", str(program)], check=True)
    done = subprocess.run([program, "1500", "0", "40"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "0 violations" in done.stdout
