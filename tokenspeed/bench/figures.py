"""What a benchmark found with a number of sessions at once, as a line of JSON that `pareto` reads."""

from __future__ import annotations

import msgspec


class Figure(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Tokens a second. `agentic` says the mean rate of a user, and over how many GPUs in which layout; `serve` the
    median rate of a stream, and other things that are not read."""

    concurrency: int
    output_tok_s: float
    user_tok_s: float | None = None
    stream_tok_s_p50: float | None = None
    layout: str | None = None
    gpus: int | None = None
