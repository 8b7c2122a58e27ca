"""How often a stream is written to: writing takes a share of the core, however many streams there are."""

from __future__ import annotations

CHUNK_SECONDS = 75e-6
"""Processor time of one chunk through grpc.aio, whatever is in it: 60 to 120 µs, of which the kernel takes 27."""

SHARE = 0.25
"""Of the core, for writing chunks."""

LONGEST_SECONDS = 0.05

GATHER_SECONDS = 0.25
"""How long outputs gather that are told at the end only; the end itself is told at once."""


def pause_beside(num_streams: int) -> float:
    """Seconds from one chunk of a stream to its next, with so many streams in progress.

    One of 64 rests 19 ms: at 200 tokens a second four share a chunk. Slower streams than that wait for nothing, nor
    does a first token or a last one.
    """
    return min(LONGEST_SECONDS, num_streams * CHUNK_SECONDS / SHARE)
