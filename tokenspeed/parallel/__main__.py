"""What a model would do on many ranks, from its config.json alone; what ranks of this machine do, measured."""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenspeed.checkpoint.config import ModelConfig, read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.errors import ConfigError
from tokenspeed.models.explain import CONTEXT, DTYPES, PROMPT_TOKENS, Question, compared, explained
from tokenspeed.parallel.cost import BOTH, KINDS, Hardware, hardware
from tokenspeed.parallel.explain import described
from tokenspeed.parallel.mesh import ARGUMENTS, FLAGS, Mesh


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; 0, or 1 with one line on standard error for what cannot be."""
    asked = _parser().parse_args(arguments)
    try:
        for line in _lines(asked):
            print(line, flush=True)
    except ConfigError as error:
        print(f"tokenspeed.parallel: {error}", file=sys.stderr)
        return 1
    return 0


def _lines(asked: argparse.Namespace) -> Iterator[str]:
    if asked.command == "measure":
        yield from _measured(asked)
        return
    # A folder with nothing but config.json is enough; so is a checkpoint.
    config = read_model_config(resolve(asked.model, "dummy"))
    machine = hardware(asked.links, asked.ranks_per_machine, asked.bandwidth)
    if asked.command != "compare":
        mesh = Mesh.of(asked.world, **{argument: getattr(asked, argument) for argument in ARGUMENTS.values()})
    if asked.command == "decode":
        yield from _decoded(config, mesh, asked, machine)
        return
    question = Question(asked.batch, asked.context, asked.prompt_tokens, asked.dtype, machine)
    if asked.command == "compare":
        yield from compared(config, asked.world, question)
    else:
        yield from explained(config, mesh, question)


def _decoded(config: ModelConfig, mesh: Mesh, asked: argparse.Namespace, machine: Hardware) -> Iterator[str]:
    # The other commands have no use for torch.distributed.
    from tokenspeed.models.decode_times import StepTimes, decode_times  # noqa: PLC0415
    from tokenspeed.parallel.alone import run_alone  # noqa: PLC0415
    from tokenspeed.parallel.measure import started  # noqa: PLC0415

    shapes = [(rows, context) for context, rows in itertools.product(asked.context, asked.batch)]
    given = (config, DTYPES[asked.dtype], shapes, machine)
    yield f"{config.architecture} over {mesh}"
    yield described(machine, mesh)
    yield "decode steps, the model's body and logits in a graph, random weights:"
    if not asked.alone:
        yield "  context   rows a group   measured ms   predicted ms"
        ranks: Iterable[list[StepTimes]] = started(mesh, asked.device, decode_times, *given)
        for times in ranks:
            one, measured = times[0], max(each.measured for each in times)
            yield f"  {one.context:>7,}  {one.rows:>12}  {measured * 1e3:>12.3f}  {one.predicted.total * 1e3:>13.3f}"
        return
    yield f"RANK 0 OF {mesh.world} ALONE, ALL COLLECTIVES LEFT OUT: results mean nothing, and no step of {mesh.world}"
    yield "ranks is measured, but what one of them computes. What is left out is predicted in the last column."
    yield "  context   rows a group   alone: measured ms   predicted ms   measured / predicted   left out, predicted ms"
    alone: Iterable[StepTimes] = run_alone(mesh, asked.device, decode_times, *given)
    for each in alone:
        computed = each.predicted_alone.total
        yield (
            f"  {each.context:>7,}  {each.rows:>12}  {each.measured * 1e3:>18.3f}  {computed * 1e3:>13.3f}"
            f"  {each.measured / computed:>20.2f}  {(each.predicted.total - computed) * 1e3:>22.3f}"
        )


def _measured(asked: argparse.Namespace) -> Iterator[str]:
    from tokenspeed.parallel import measure  # noqa: PLC0415

    timings = list(measure.collectives(asked.world, asked.device))
    yield from measure.table(timings)
    found = measure.fitted(timings)
    for name, link in (("near", found.near), ("shared", found.shared)):
        if link is not None:
            yield f"{name}: {link.seconds * 1e6:.1f} µs + bytes / {link.bandwidth / 1e9:.1f} GB/s"
    if found.stream_bandwidth is not None:
        yield f"memory: {found.stream_bandwidth / 1e9:,.0f} GB/s of a read-only stream"
    if asked.links is not None:
        measure.write_links(asked.links, found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.parallel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="the steps of one layout: what is sent, and how long a step takes")
    compare = commands.add_parser("compare", help="predicted step times of the usual layouts, the fastest first")
    decode = commands.add_parser("decode", help="measured step times of one layout beside the predicted ones")
    for command in (explain, compare, decode):
        command.add_argument("--model", required=True, help="folder with a config.json, .gguf file or hub name")
        command.add_argument("--world", type=_positive, required=True, help="ranks, a GPU each")
        command.add_argument("--batch", type=_positive, nargs="+", default=[1, 8, 32, 128], help="rows of decode steps")
        command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations")
        command.add_argument("--links", default=BOTH, help=f"{', '.join(KINDS)}, or a file that `measure` wrote")
        command.add_argument(
            "--bandwidth", type=_rate, metavar="BYTES", help="a second of a read-only stream, if not as in --links"
        )
        command.add_argument("--ranks-per-machine", type=_positive, default=8)
    had = "tokens that each row has already"
    for command in (explain, compare):
        command.add_argument("--context", type=_positive, default=CONTEXT, help=had)
        command.add_argument("--prompt-tokens", type=_positive, default=PROMPT_TOKENS, help="of a step of prompts")
    decode.add_argument("--context", type=_positive, nargs="+", default=[CONTEXT], help=f"{had}, one after the other")
    decode.add_argument(
        "--alone", action="store_true", help="one of the ranks, on one GPU: what it computes, collectives left out"
    )
    measure = commands.add_parser("measure", help="check and time the collectives between processes of this machine")
    measure.add_argument("--world", type=_positive, default=2, help="ranks, a GPU each")
    for command in (measure, decode):
        command.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    measure.add_argument("--links", type=Path, metavar="FILE", help="where to write what predictions need")
    for axis, argument in ARGUMENTS.items():
        for command in (explain, decode):
            command.add_argument(FLAGS[axis], dest=argument, type=_positive, metavar="RANKS")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _rate(text: str) -> float:
    value = float(text)
    if not 1e6 <= value <= 1e15:
        raise argparse.ArgumentTypeError(f"must be bytes a second, between 1e6 and 1e15, got {text}")
    return value


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it without a word
    sys.exit(main())
