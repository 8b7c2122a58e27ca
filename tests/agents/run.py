"""Runs agents against the server: `python -m tests.agents.run [--format FORMAT | --demo] [NAME ...]`.

Each agent on the PATH gets a project with a bug and a test that fails, and a server with a scripted model that calls
the agent's own tools. It has done its work when the test failed once, then passed, by what the agent ran. The exit
status is 1 if one has not. scripts/agents.sh installs the agents first.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.agents.table import AGENTS, PROMPT, Agent, Model
from tests.e2e.server import Server, serving
from tests.scripted.checkpoint import CALLS, CONTEXT, chat_template

SCRIPTS = Path(__file__).with_name("scripts")
SECONDS = 400

FILES = {
    "rate.py": '''\
"""Prices with tax."""


def with_tax(net, percent):
    """The price that a customer pays."""
    return net + percent / 100
''',
    "test_rate.py": '''\
from pathlib import Path

from rate import with_tax

outcome = "passed" if with_tax(200, 10) == 220 else "failed"
with Path("runs.log").open("a") as log:
    log.write(outcome + "\\n")
print(f"1 test, {outcome}")
raise SystemExit(outcome == "failed")
''',
}
SAID = "The test passes now"


@dataclass(frozen=True)
class Outcome:
    """What a run came to: `faults` is empty if the agent did its work."""

    agent: Agent
    version: str
    faults: list[str]
    output: str
    served: str

    @property
    def line(self) -> str:
        verdict = "ok" if not self.faults else "FAILED: " + "; ".join(self.faults)
        return f"{self.agent.name:15} {self.version:12} {self.served:58} {verdict}"


def run_scripted(agent: Agent, call_format: str, work: Path) -> Outcome:
    """One agent in a project of its own below `work`, with a model that knows what to do."""
    program = ("tests.scripted.serve", str(SCRIPTS / f"{agent.name}.json"), call_format)
    with serving(work / "log", program=program) as server:
        agent = agent.pointed_at(Model(server.url, "scripted", CONTEXT, 8192))
        output, faults, served = run_agent(agent.command, agent, server, work, PROMPT)
    runs = (work / "project" / "runs.log").read_text().split() if (work / "project" / "runs.log").is_file() else []
    if runs != ["failed", "passed"]:
        faults.append(f"the test was run with the outcomes {runs}")
    if (work / "project" / "rate.py").read_text() == FILES["rate.py"]:
        faults.append("rate.py was not edited")
    if SAID not in " ".join(output.split()):
        faults.append("the last answer was not shown")
    return Outcome(agent, version(agent, work / "home"), faults, output, served)


def run_demo(agent: Agent, work: Path) -> Outcome:
    """One agent with the embedded model, which is too small to be of use: its requests are answered, whatever it says.

    The model's own chat template knows no tools, so it is given one that does.
    """
    template = work / "template.jinja"
    template.write_text(chat_template("hermes"))
    with serving(work / "log", "--chat-template", str(template)) as server:
        agent = agent.pointed_at(Model(server.url, "SmolLM2-135M-Instruct", 8192, 40))
        output, faults, served = run_agent(agent.small or agent.command, agent, server, work, "Say hello.")
    return Outcome(agent, version(agent, work / "home"), faults, output, served)


def run_agent(
    command: tuple[str, ...], agent: Agent, server: Server, work: Path, prompt: str
) -> tuple[str, list[str], str]:
    """What an agent prints that works on `prompt` in a new project, its faults, and what the server did for it."""
    make_project(work / "project")
    output, status = converse((*command, prompt), agent, work / "project", work / "home")
    faults = [] if status == 0 else ["it took too long" if status is None else f"exit status {status}"]
    refused = re.findall(r"POST '(\S+)' ([345]\d\d) ", server.log.read_text())
    faults += [f"{path} answered {code}" for path, code in refused]
    return output, faults, facts(server)


def make_project(folder: Path) -> None:
    """A git repository with a bug."""
    folder.mkdir(parents=True)
    for name, text in FILES.items():
        (folder / name).write_text(text)
    git = ("git", "-c", "user.name=Test", "-c", "user.email=test@example.org")
    for arguments in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "Prices")):
        subprocess.run([*git, *arguments], cwd=folder, check=True)


def converse(command: tuple[str, ...], agent: Agent, project: Path, home: Path) -> tuple[str, int | None]:
    """What a configured agent prints, and its exit status, None if it did not end in time."""
    for name, text in agent.files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(text)
    started = subprocess.Popen(
        command,
        cwd=project, env=environment(agent, home), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = started.communicate(timeout=SECONDS)
        return output, started.returncode
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # the programs of the registries are often only in front of another one
        return started.communicate()[0], None


def environment(agent: Agent, home: Path) -> dict[str, str]:
    """Nothing of this process but the PATH."""
    for folder in (home, home.parent / "tmp"):
        folder.mkdir(parents=True, exist_ok=True)
    fixed = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home.parent / "tmp"), "LANG": "C.UTF-8"}
    return {**fixed, "TERM": "dumb", **agent.env}


def version(agent: Agent, home: Path) -> str:
    """What the agent says of itself."""
    asked = [agent.command[0], "--help" if agent.command[0] == "mini" else "--version"]
    done = subprocess.run(asked, env=environment(agent, home), capture_output=True, text=True, check=False, timeout=60)
    found = re.search(r"\d+\.\d+\.\d+", done.stdout + done.stderr)
    return found[0] if found else "?"


def facts(server: Server) -> str:
    """How many requests were served, and how much of their prompts was cached."""
    answered = re.findall(r"POST '(\S+)' 200 ", server.log.read_text())
    prompts, cached = server.metric("prompt_tokens_total"), server.metric("prompt_tokens_cached_total")
    if not answered:
        return ""
    return f"{len(answered)} × {answered[0]}, {prompts:.0f} prompt tokens, {cached / prompts:.0%} cached"


def main() -> int:
    """Print a line for each agent; what one that failed printed goes to stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(agent.name for agent in AGENTS))
    parser.add_argument("--format", choices=sorted(CALLS), default="hermes", help="how the model writes its calls")
    parser.add_argument("--demo", action="store_true", help="one turn with the embedded model instead")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {agent.name for agent in AGENTS}
    if unknown:
        parser.error(f"no such agent: {', '.join(sorted(unknown))}")
    outcomes = []
    for agent in AGENTS:
        if arguments.names and agent.name not in arguments.names:
            continue
        if shutil.which(agent.command[0]) is None:
            print(f"{agent.name:15} {agent.command[0]} is not on the PATH")
            continue
        with tempfile.TemporaryDirectory() as work:
            outcome = (
                run_demo(agent, Path(work)) if arguments.demo else run_scripted(agent, arguments.format, Path(work))
            )
            print(outcome.line, flush=True)
            if outcome.faults:
                print(outcome.output, (Path(work) / "log").read_text(), sep="\n", file=sys.stderr)
        outcomes.append(outcome)
    return int(not outcomes or any(outcome.faults for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
