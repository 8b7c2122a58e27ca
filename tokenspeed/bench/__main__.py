"""`python -m tokenspeed.bench NAME …`: benchmark programs.

`serve` measures a running server over HTTP, `control` the control plane alone, `decode` the engine without a front end,
`steps` its steps with prompts, `agentic` sessions of agents on the engine, `pareto` what these found in several layouts
as a plot, `front` the front end without an engine, `gateway` its gRPC door, `grammars` structured output.
"""

from __future__ import annotations

import argparse
import sys

from tokenspeed.bench import agentic, control, decode, front, grammars, pareto, serve, steps


def main() -> int:
    """Run one program; the return value is the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenspeed.bench", description=__doc__)
    programs = parser.add_subparsers(dest="program", required=True, metavar="NAME")
    serve.add_flags(
        programs.add_parser("serve", help="streaming latency and throughput of a server", description=serve.__doc__)
    )
    control.add_flags(
        programs.add_parser("control", help="microseconds a step of the control plane", description=control.__doc__)
    )
    decode.add_flags(
        programs.add_parser("decode", help="decode rates of the engine without a front end", description=decode.__doc__)
    )
    steps.add_flags(
        programs.add_parser("steps", help="steps with prompts, on the host and the device", description=steps.__doc__)
    )
    agentic.add_flags(
        programs.add_parser("agentic", help="turns of agents' sessions, in a closed loop", description=agentic.__doc__)
    )
    pareto.add_flags(
        programs.add_parser("pareto", help="speed of a user against a GPU's, by layout", description=pareto.__doc__)
    )
    front.add_flags(
        programs.add_parser("front", help="what the front end costs a streamed token", description=front.__doc__)
    )
    front.add_flags(programs.add_parser("gateway", help="the same of a token over gRPC, which needs the extra smg"))
    grammars.add_flags(
        programs.add_parser("grammars", help="what structured output costs", description=grammars.__doc__)
    )
    options = parser.parse_args()
    mains = {
        "serve": serve.main,
        "control": control.main,
        "decode": decode.main,
        "steps": steps.main,
        "agentic": agentic.main,
        "pareto": pareto.main,
        "front": front.main,
        "gateway": _gateway,
        "grammars": grammars.main,
    }
    return mains[options.program](options)


def _gateway(options: argparse.Namespace) -> int:
    try:
        from tokenspeed.bench import gateway  # noqa: PLC0415  (an extra)
    except ModuleNotFoundError as error:
        print(f"gateway: needs the package {error.name}: pip install 'tokenspeed[smg]'", file=sys.stderr)
        return 2
    return gateway.main(options)


if __name__ == "__main__":
    sys.exit(main())
