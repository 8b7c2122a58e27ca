"""A process that judges grammars: `python -m tokenspeed.text.grammars.worker SECONDS BYTES`.

Frames on its standard input and output, 4 bytes of length and a msgpack message: first the `Vocabulary`, then a
`Grammar` at a time, each answered by a `Verdict`. One that takes more than SECONDS of processor time kills it by
SIGPROF; its memory is bounded by BYTES, its stack by `STACK_BYTES`. Whoever started it makes a new one.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from typing import BinaryIO

import msgspec

from tokenspeed.request import Grammar
from tokenspeed.text.grammars.vocabulary import Vocabulary

CACHE_BYTES = 128 << 20
STACK_BYTES = 8 << 20
"""Less than an engine compiles with, whatever the system's own limit is."""


class Verdict(msgspec.Struct, frozen=True, omit_defaults=True):
    """The rules of a grammar, or why it is refused."""

    rules: str = ""
    refusal: str = ""


def main() -> None:
    """Entry point of the child process."""
    seconds, num_bytes = float(sys.argv[1]), int(sys.argv[2])
    # Ctrl-C reaches the whole process group; this one ends with its standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (min(STACK_BYTES, most) if most >= 0 else STACK_BYTES, most))
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    os.nice(5)
    answers = os.fdopen(os.dup(1), "wb")
    sys.stderr = os.fdopen(os.dup(2), "w")
    # xgrammar warns there, in words of the grammar.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    # tvm_ffi loads torch where it finds it, and needs none.
    sys.modules["torch"] = None  # type: ignore[assignment]
    serve(sys.stdin.buffer, answers, seconds)


def serve(questions: BinaryIO, answers: BinaryIO, seconds: float) -> None:
    """Answer until there is no more to read."""
    from tokenspeed.text.grammars.binding import Compiler, GrammarError  # noqa: PLC0415
    from tokenspeed.text.grammars.judge import judged  # noqa: PLC0415

    vocabulary = msgspec.msgpack.decode(_frame(questions) or b"", type=Vocabulary)
    compiler = Compiler(vocabulary, cache_bytes=CACHE_BYTES)
    grammars = msgspec.msgpack.Decoder(Grammar)
    while (frame := _frame(questions)) is not None:
        grammar = grammars.decode(frame)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            verdict = Verdict(rules=judged(compiler, grammar))
        except GrammarError as error:
            verdict = Verdict(refusal=str(error) or "cannot be compiled")
        except MemoryError:
            verdict = Verdict(refusal="takes too much memory")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        body = msgspec.msgpack.encode(verdict)
        answers.write(len(body).to_bytes(4, "little") + body)
        answers.flush()


def _frame(source: BinaryIO) -> bytes | None:
    size = source.read(4)
    return source.read(int.from_bytes(size, "little")) if len(size) == 4 else None


if __name__ == "__main__":
    main()
