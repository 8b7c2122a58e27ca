"""`python -m tokenspeed.simulate TRACE …` replays sessions; `generate OUT` makes some."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from tokenspeed._core.types import Policy
from tokenspeed.errors import ConfigError
from tokenspeed.simulate.door import Sizes
from tokenspeed.simulate.generate import generate
from tokenspeed.simulate.replay import Load, replay
from tokenspeed.simulate.report import table
from tokenspeed.simulate.sessions import MAX_PAUSE, MAX_PROMPT, apply_rules, read_sessions, write_sessions
from tokenspeed.simulate.step_models import STEP_MODELS


def _whole(low: int, high: int) -> Callable[[str], int]:
    """A flag's whole number in these bounds."""

    def count(text: str) -> int:
        if not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return count


_count = _whole(1, 1_000_000_000)


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


def _amount(text: str) -> float:
    if not 0.0 <= float(text) < float("inf"):
        raise ValueError(text)
    return float(text)


def _rate(text: str) -> float:
    if _amount(text) == 0.0:
        raise ValueError(text)
    return float(text)


def _replay_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenspeed.simulate",
        description="Replay agent sessions against the control plane and a step-time model, without a device.",
        epilog="`generate OUT` in the place of TRACE makes a file of sessions.",
    )
    flag = parser.add_argument
    flag("trace", metavar="TRACE", type=Path, help="file of sessions, .json or .json.gz")
    flag("--step-model", choices=sorted(STEP_MODELS), default="h100-v2l", help="device and model")
    flag("--sessions", type=_counts, default=[8, 16, 24], help="sessions at once, e.g. 8,16,24: a column each")
    flag("--instances", type=_count, default=1, help="engines; a session always goes to the same one")
    flag(
        "--seed", type=_whole(0, 2**63), default=0, help="of order, start turns and start times (default: %(default)s)"
    )
    flag("--window", type=_rate, default=600.0, help="virtual seconds measured (default: %(default)g)")
    flag("--warm-up", type=_amount, default=120.0, help="virtual seconds before them (default: %(default)g)")
    flag("--ramp", type=_amount, default=60.0, help="virtual seconds over which sessions start (default: %(default)g)")
    flag("--shared-system", action="store_true", help="tools and system prompt are the same in all sessions")
    flag("--kv-tokens", type=_count, help="tokens of KV cache (default: the step model's)")
    flag("--host-gb", type=_amount, default=0.0, help="memory of the host tier, 10^9 bytes (default: none)")
    flag("--host-gbps", type=_rate, default=50.0, help="its bandwidth each way, 10^9 bytes/s (default: %(default)g)")
    flag("--block-size", type=_whole(1, 65_536), default=64, help="tokens of a KV block (default: %(default)s)")
    flag("--max-rows", type=_whole(1, 65_536), default=128, help="most requests in a step (default: %(default)s)")
    flag("--chunk-tokens", type=_whole(1, 1_048_576), default=8192, help="most tokens in a step (default: %(default)s)")
    flag("--max-queued", type=_count, default=4096, help="most requests that wait (default: %(default)s)")
    flag("--policy", choices=("footprint", "lru"), default="footprint", help="admission by sessions, or none")
    flag("--tps-floor", type=_amount, default=70.0, help="tokens a second of a stream (default: %(default)g)")
    flag("--promise", action="store_true", help="what would break the floor is refused")
    flag("--max-queue-seconds", type=_amount, default=300.0, help="longest expected wait (default: %(default)g)")
    flag("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def _generate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenspeed.simulate generate",
        description="Make sessions with the statistics of recorded coding agents.",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write, .json or .json.gz")
    parser.add_argument("--sessions", type=_count, default=400, help="how many (default: %(default)s)")
    parser.add_argument(
        "--seed", type=_whole(0, 2**63), default=0, help="equal seeds give equal files (default: %(default)s)"
    )
    return parser


def _replay(arguments: argparse.Namespace) -> None:
    if arguments.promise and not arguments.tps_floor:
        raise ConfigError("--promise needs a --tps-floor above 0")
    model = STEP_MODELS[arguments.step_model]
    sizes = Sizes(
        model=model,
        kv_tokens=arguments.kv_tokens or model.kv_tokens,
        host_gb=arguments.host_gb,
        host_gbps=arguments.host_gbps,
        block_size=arguments.block_size,
        max_rows=arguments.max_rows,
        chunk_tokens=arguments.chunk_tokens,
        max_queued=arguments.max_queued,
        policy=Policy(
            tps_floor=arguments.tps_floor,
            floor_is_promise=arguments.promise,
            footprints=arguments.policy == "footprint",
            max_queue_seconds=arguments.max_queue_seconds,
        ),
    )
    recorded = read_sessions(arguments.trace)
    if arguments.json is not None:
        _write(arguments.json, "")  # a path that cannot be written is found before the work, not after
    load = Load(
        sessions=apply_rules(recorded),
        seed=arguments.seed,
        warm_up=arguments.warm_up,
        window=arguments.window,
        ramp=arguments.ramp,
        shared_system=arguments.shared_system,
    )
    if not load.sessions:
        raise ConfigError(f"{arguments.trace}: every request is longer than {MAX_PROMPT} tokens")
    turns = sum(len(session.turns) for session in recorded)
    left = sum(len(session.turns) for session in load.sessions)
    print(
        f"{len(load.sessions)} of {len(recorded)} sessions, {left} of {turns} turns (prompts up to {MAX_PROMPT} "
        f"tokens, pauses up to {MAX_PAUSE:g} s); seed {load.seed}\n"
        f"{model.name}: {sizes.kv_tokens} tokens of KV cache, host tier {sizes.host_gb:g} GB at "
        f"{sizes.host_gbps:g} GB/s; policy {arguments.policy}; warm-up {load.warm_up:g} s, window {load.window:g} s",
        flush=True,
    )
    columns = [replay(load, sizes, sessions=count, instances=arguments.instances) for count in arguments.sessions]
    print(table(columns))
    if arguments.json is not None:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
        text = json.dumps({"settings": settings, "figures": [asdict(column) for column in columns]}, indent=1)
        _write(arguments.json, text + "\n")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None


def main(words: list[str]) -> int:
    """Run one command line; the return value is the exit status."""
    try:
        if words[:1] == ["generate"]:
            wish = _generate_parser().parse_args(words[1:])
            write_sessions(wish.out, generate(wish.sessions, wish.seed))
        else:
            _replay(_replay_parser().parse_args(words))
    except ConfigError as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
