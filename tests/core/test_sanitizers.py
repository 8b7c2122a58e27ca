"""Random calls against the C++ core without Python, under the sanitizers.

The core has no threads. Under the thread sanitizer two threads drive a scheduler each, so that a state which two
schedulers share unseen would be found.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
FLAGS = ("-std=c++20", "-O1", "-g1", "-fno-sanitize-recover=all", f"-I{CSRC}")

TWO_THREADS = """
#define main drive
#include "{drive}"
#undef main

#include <array>
#include <thread>

int main(int argc, char** argv) {{
  std::array<int, 2> status{{}};
  {{
    std::jthread one([&] {{ status[0] = drive(argc, argv); }});
    std::jthread other([&] {{ status[1] = drive(argc, argv); }});
  }}
  return status[0] + status[1];
}}
"""

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")


def build(source: Path, sanitizers: str) -> Path:
    assert COMPILER is not None
    program = source.with_suffix("")
    command = [COMPILER, *FLAGS, f"-fsanitize={sanitizers}", str(source), "-pthread", "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The core with its driver under each sanitizer. Each is one translation unit, so that the headers are parsed
    once, which halves the time of compiling file by file; the two are compiled side by side."""
    folder = tmp_path_factory.mktemp("sanitizers")
    core = "".join(f'#include "{source}"\n' for source in sorted(CSRC.glob("*.cc")))
    driver = HERE / "drive.cc"
    mains = {"address,undefined": f'#include "{driver}"', "thread": TWO_THREADS.format(drive=driver)}
    sources = [folder / f"{sanitizers.partition(',')[0]}.cc" for sanitizers in mains]
    for source, main in zip(sources, mains.values(), strict=True):
        source.write_text(f"{core}{main}\n")
    with ThreadPoolExecutor() as pool:
        yield dict(zip(mains, pool.map(build, sources, mains), strict=True))


def drive(program: Path, operations: int, seeds: int) -> str:
    command = [str(program), str(operations), "0", str(seeds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_random_calls_touch_only_their_own_memory_and_are_all_defined(programs: dict[str, Path]) -> None:
    assert drive(programs["address,undefined"], 1500, 100).count("0 violations") == 1


def test_two_schedulers_in_two_threads_share_nothing(programs: dict[str, Path]) -> None:
    assert drive(programs["thread"], 1500, 40).count("0 violations") == 2


MISTAKES = {
    "address": ("heap-use-after-free", "int main() { int* p = new int(0); delete p; return *p; }"),
    "undefined": ("signed integer overflow", "int main(int argc, char**) { volatile int n = 0x7fffffff; n += argc; }"),
    "thread": ("data race", "#include <thread>\nint n;\nint main() { std::thread t([] { ++n; }); ++n; t.join(); }"),
}


@pytest.mark.parametrize("sanitizer", MISTAKES)
def test_a_clean_run_means_something(sanitizer: str, tmp_path: Path) -> None:
    words, code = MISTAKES[sanitizer]
    source = tmp_path / "mistake.cc"
    source.write_text(code)
    done = subprocess.run([build(source, sanitizer)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0 and words in done.stderr
