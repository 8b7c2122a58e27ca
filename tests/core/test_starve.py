"""A submission for which there is no memory leaves nothing behind."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")


@pytest.mark.skipif(COMPILER is None, reason="no g++")
def test_whichever_allocation_of_a_submission_fails_nothing_has_changed(tmp_path: Path) -> None:
    assert COMPILER is not None
    source, program = tmp_path / "all.cc", tmp_path / "starve"
    files = [*sorted(CSRC.glob("*.cc")), HERE / "starve.cc"]
    source.write_text("".join(f'#include "{file}"\n' for file in files))
    flags = ["-std=c++20", "-O0", "-g1", "-Wall", "-Wextra", f"-I{CSRC}"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    failed = re.fullmatch(r"(\d+) allocations failed, 0 violations\n", done.stdout)
    assert failed and int(failed[1]) >= 5 * 12, "some allocations of each submission"
