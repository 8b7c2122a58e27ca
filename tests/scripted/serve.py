"""The real server with a scripted model: `python -m tests.scripted.serve SCRIPT FORMAT [flags of the server]`.

Run from the repository's root. FORMAT is how the model writes its calls: a key of `checkpoint.CALLS`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.scripted.checkpoint import write_checkpoint
from tokenspeed.engine.link import ProcessLink
from tokenspeed.entrypoints import api, life


class ScriptedLink(ProcessLink):
    program = "tests.scripted.engine"


def main() -> int:
    script, call_format, *flags = sys.argv[1:]
    life.ProcessLink = ScriptedLink
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "scripted", Path(script), call_format)
        return api.main(["--model", str(Path(folder) / "scripted"), "--load-format", "dummy", *flags])


if __name__ == "__main__":
    sys.exit(main())
