"""What a model would do on many ranks, from its config.json alone: no weights are read, no GPU is needed."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence

from tokenspeed.checkpoint.config import read_model_config
from tokenspeed.checkpoint.source import resolve
from tokenspeed.errors import ConfigError
from tokenspeed.models.explain import CONTEXT, DTYPES, PROMPT_TOKENS, Question, compared, explained
from tokenspeed.parallel.cost import LINKS, Hardware
from tokenspeed.parallel.mesh import FLAGS, Mesh

AXES = {
    "attn": "attn_tp",
    "attn_data": "attn_dp",
    "dense": "dense_tp",
    "moe_tp": "moe_tp",
    "moe_ep": "moe_ep",
    "vocab": "vocab_tp",
}
"""Axis → the argument of `Mesh.of` that sizes it."""


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
    # A folder with nothing but config.json is enough; so is a checkpoint.
    config = read_model_config(resolve(asked.model, "dummy"))
    hardware = Hardware(near=LINKS[asked.links], ranks_per_machine=asked.ranks_per_machine)
    question = Question(asked.batch, asked.context, asked.prompt_tokens, asked.dtype, hardware)
    if asked.command == "compare":
        return compared(config, asked.world, question)
    sizes = {argument: getattr(asked, argument) for argument in AXES.values()}
    return explained(config, Mesh.of(asked.world, **sizes), question)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.parallel", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    explain = commands.add_parser("explain", help="the steps of one layout: what is sent, and how long a step takes")
    compare = commands.add_parser("compare", help="predicted step times of the usual layouts, the fastest first")
    for command in (explain, compare):
        command.add_argument("--model", required=True, help="folder with a config.json, .gguf file or hub name")
        command.add_argument("--world", type=_positive, required=True, help="ranks, a GPU each")
        command.add_argument("--batch", type=_positive, nargs="+", default=[1, 8, 32, 128], help="rows of decode steps")
        command.add_argument("--context", type=_positive, default=CONTEXT, help="tokens that each row has already")
        command.add_argument("--prompt-tokens", type=_positive, default=PROMPT_TOKENS, help="of a step of prompts")
        command.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of weights and activations")
        command.add_argument("--links", choices=LINKS, default="nccl", help="what carries the collectives")
        command.add_argument("--ranks-per-machine", type=_positive, default=8)
    for axis, argument in AXES.items():
        explain.add_argument(FLAGS[axis], dest=argument, type=_positive, metavar="RANKS")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… | head` ends it without a word
    sys.exit(main())
