"""The mutation run: small faults in `csrc/`, one at a time, and whether the tests of the control plane notice.

`python -m tests.core.mutate --count 250 --jobs 2 [--only FILE ...]` draws mutants (tests/core/mutations.py), builds
`drive.cc` with each and runs it: random calls with the self-check after every one. What survives that meets the
Python oracle (`fuzz.py`) and the unit tests, with an extension built from the mutated sources. It prints a table
and the survivors, and writes everything to a JSON file. It works on a copy; the checkout stays as it is.

A mutant that does not compile was killed by the types and counts apart, like one whose object code is the same.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue

from tests.core.mutations import OPERATORS, Mutant, mutants

ROOT = Path(__file__).resolve().parents[2]
MOVES_NOTHING = {
    "check.cc": "the self-check itself",
    "door.h": "conversions for Python",
    "hash.cc": "held by published vectors",
    "hash.h": "held by published vectors",
    "proofs.h": "compile-time only",
    "rates.h": "measures time",
    "step_time.cc": "a model of time",
    "step_time.h": "a model of time",
    "taken.h": "counts for a test",
    "types.h": "names and numbers",
}
"""Files of csrc/ that are not mutated, and why."""

FLAGS = ("-std=c++20", "-O1", "-g0", "-D_GLIBCXX_ASSERTIONS", "-Werror=unused-result")
LONG = 600
MEMORY = 4 << 30  # bytes, for a mutant that never stops taking some
OUTCOMES = ("stillborn", "same code", "drive", "oracle", "unit tests", "survived")


@dataclass(frozen=True)
class Effort:
    """How long the tests may look for a fault."""

    operations: int  # of drive, a seed
    seeds: int
    fuzz_operations: int
    fuzz_seeds: int


@dataclass(frozen=True)
class Verdict:
    mutant: Mutant
    outcome: str
    complaint: str  # the last line of what noticed it


def computed_by_children() -> float:
    """Processor seconds of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


class Workshop:
    """A copy of the sources in which one mutant at a time is built and tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.csrc = folder / "csrc"
        self.same = b""  # the object code of the unchanged sources, once it is known
        self.took: list[float] = []  # seconds that each stage computed with the unchanged sources
        self.patience = LONG  # seconds that one process of the stage at hand may compute

    @staticmethod
    def equipped(folder: Path, effort: Effort) -> Workshop:
        """A first one, in which the unchanged sources pass everything."""
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "kernels", "*.cpp")
        for part in ("csrc", "tokenspeed", "tests/core"):
            shutil.copytree(ROOT / part, folder / part, ignore=ignored)
        shutil.copy(ROOT / "tests" / "__init__.py", folder / "tests")
        made = Workshop(folder)
        sources = [f"csrc/{path.name}" for path in sorted(made.csrc.glob("*.cc"))]
        made.write_unit("drive_unit.cc", [*sources, "tests/core/drive.cc"])
        made.write_unit("door_unit.cc", ["tokenspeed/_core/scheduler.cpp", *sources])
        door = ("tokenspeed/_core/scheduler.pyx", "-o", "tokenspeed/_core/scheduler.cpp")
        untranslated = made.call(sys.executable, "-m", "cython", "--cplus", "-3", *door)
        if untranslated is not None:
            raise SystemExit(f"the door does not translate: {untranslated}")
        for outcome, attempt in made.stages(effort):
            began = computed_by_children()
            complaint = attempt()
            if complaint is not None:
                raise SystemExit(f"the unchanged sources fail ({outcome}): {complaint}")
            made.took.append(computed_by_children() - began)
        made.same = (folder / "unit.o").read_bytes()
        return made

    def again(self, folder: Path) -> Workshop:
        """Another one like this."""
        other = Workshop(shutil.copytree(self.folder, folder))
        other.same, other.took = self.same, self.took
        return other

    def write_unit(self, name: str, sources: Iterable[str]) -> None:
        """One translation unit of all: the headers, which most mutants concern, are parsed once."""
        (self.folder / name).write_text("".join(f'#include "{source}"\n' for source in sources))

    def call(self, *command: str | Path) -> str | None:
        """What a command complains of, in one line; nothing if it succeeds."""
        limits = ["nice", "prlimit", f"--as={MEMORY}", f"--cpu={self.patience}:{self.patience + 5}"]
        done = subprocess.run(
            [*limits, *map(str, command)],
            cwd=self.folder,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode == -signal.SIGXCPU:
            return f"no end within {self.patience} s"
        if done.returncode == 0:
            return None
        lines = (done.stdout + done.stderr).strip().splitlines()
        telling = [line for line in lines if "error" in line.lower() or line.startswith("FAILED")] or lines
        return telling[-1] if telling else f"exit status {done.returncode}"

    def compile(self, *arguments: str | Path) -> str | None:
        return self.call("g++", *FLAGS, "-I.", "-Icsrc", *arguments)

    def verdict(self, mutant: Mutant, effort: Effort) -> Verdict:
        path = self.csrc / mutant.file
        text = path.read_text()
        path.write_text(mutant.apply(text))
        try:
            return Verdict(mutant, *self.trials(effort))
        finally:
            path.write_text(text)

    def trials(self, effort: Effort) -> tuple[str, str]:
        """The outcome for the sources as they are now, and the complaint of what noticed a fault.

        A stage that takes much longer than with the unchanged sources counts as a complaint.
        """
        for (outcome, attempt), took in zip(self.stages(effort), self.took, strict=True):
            self.patience = LONG if outcome == "stillborn" else 10 + int(5 * took)
            complaint = attempt()
            if complaint is not None:
                return outcome, complaint
        return "survived", ""

    def stages(self, effort: Effort) -> Iterator[tuple[str, Callable[[], str | None]]]:
        """What is tried, in this order, and the outcome if it complains."""
        drive = ("./drive", str(effort.operations), "0", str(effort.seeds))
        include = f"-I{sysconfig.get_path('include')}"
        extension = f"tokenspeed/_core/scheduler{sysconfig.get_config_var('EXT_SUFFIX')}"
        fuzz = ("tests.core.fuzz", "--ops", str(effort.fuzz_operations), "--seeds", str(effort.fuzz_seeds))
        python = (sys.executable, "-m")
        yield "stillborn", lambda: self.compile("-c", "drive_unit.cc", "-o", "unit.o")
        yield "same code", lambda: "" if (self.folder / "unit.o").read_bytes() == self.same else None
        yield "stillborn", lambda: self.compile("unit.o", "-o", "drive")
        yield "drive", lambda: self.call(*drive)
        yield "stillborn", lambda: self.compile(include, "-fPIC", "-shared", "door_unit.cc", "-o", extension)
        yield "oracle", lambda: self.call(*python, *fuzz)
        yield "unit tests", lambda: self.call(*python, "pytest", "-xq", "--tb=line", *self.unit_tests())

    def unit_tests(self) -> list[Path]:
        """Tests of the compiled scheduler, but not the fuzz test, which has had its turn."""
        files = sorted((self.folder / "tests" / "core").glob("test_*.py"))
        return [path for path in files if "tokenspeed._core" in path.read_text() and path.name != "test_fuzz.py"]


def draw(count: int, seed: int, only: Sequence[str] = ()) -> tuple[list[Mutant], int]:
    """`count` mutants of all that the operators make, and how many those are. The same for the same sources."""
    every: list[Mutant] = []
    for path in sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("*.cc")]):
        if path.name in only or (not only and path.name not in MOVES_NOTHING):
            every += mutants(path.name, path.read_text())
    drawn = random.Random(seed).sample(every, min(count, len(every)))
    return sorted(drawn, key=lambda mutant: (mutant.file, mutant.start, mutant.operator)), len(every)


def run(drawn: Sequence[Mutant], jobs: int, effort: Effort, scratch: Path) -> list[Verdict]:
    """Try all mutants in `jobs` copies of the sources."""
    free: Queue[Workshop] = Queue()
    first = Workshop.equipped(scratch / "0", effort)
    for workshop in [first, *(first.again(scratch / str(number)) for number in range(1, jobs))]:
        free.put(workshop)

    def one(numbered: tuple[int, Mutant]) -> Verdict:
        workshop = free.get()
        try:
            verdict = workshop.verdict(numbered[1], effort)
        finally:
            free.put(workshop)
        mutant = verdict.mutant
        place = f"{mutant.file}:{mutant.line} {mutant.operator}"
        print(f"{numbered[0]:4}/{len(drawn)} {verdict.outcome:10} {place}  {verdict.complaint[:100]}", flush=True)
        return verdict

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, enumerate(drawn, 1)))


def kill_rate(outcomes: Counter[str]) -> float:
    """Of the mutants that compile to other code, the share that some test noticed."""
    alive = sum(outcomes.values()) - outcomes["stillborn"] - outcomes["same code"]
    return 1.0 - outcomes["survived"] / alive if alive else 1.0


def table(verdicts: Sequence[Verdict]) -> str:
    header = f"{'':16}" + "".join(f"{outcome:>12}" for outcome in OUTCOMES) + f"{'killed':>9}"
    lines = [header]
    groups = [(name, [v for v in verdicts if v.mutant.operator == name]) for name in OPERATORS]
    files = sorted({verdict.mutant.file for verdict in verdicts})
    groups += [(name, [v for v in verdicts if v.mutant.file == name]) for name in files]
    for name, members in [*groups, ("all", list(verdicts))]:
        outcomes = Counter(verdict.outcome for verdict in members)
        counts = "".join(f"{outcomes[outcome]:12}" for outcome in OUTCOMES)
        lines.append(f"{name:16}{counts}{kill_rate(outcomes):9.1%}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=[], metavar="FILE", help="files of csrc/ to mutate")
    parser.add_argument("--operations", type=int, default=3000, help="of drive, a seed")
    parser.add_argument("--seeds", type=int, default=100, help="of drive")
    parser.add_argument("--fuzz-operations", type=int, default=700, help="against the oracle, a seed")
    parser.add_argument("--fuzz-seeds", type=int, default=40)
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "mutation.json")
    options = parser.parse_args()
    effort = Effort(options.operations, options.seeds, options.fuzz_operations, options.fuzz_seeds)
    drawn, of_all = draw(options.count, options.seed, options.only)
    print(f"{len(drawn)} of {of_all} mutants, seed {options.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutate-") as scratch:
        verdicts = run(drawn, options.jobs, effort, Path(scratch))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    records = [asdict(v.mutant) | {"outcome": v.outcome, "complaint": v.complaint} for v in verdicts]
    options.json.write_text(json.dumps({"seed": options.seed, "of": of_all, "mutants": records}, indent=1) + "\n")
    print(f"\n{table(verdicts)}\n\nsurvivors:")
    for mutant in (verdict.mutant for verdict in verdicts if verdict.outcome == "survived"):
        print(f"csrc/{mutant.file}:{mutant.line} ({OPERATORS[mutant.operator]})")
        print(f"  - {mutant.before}\n  + {mutant.after}")
    print(f"{time.monotonic() - began:.0f} s; all verdicts in {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
