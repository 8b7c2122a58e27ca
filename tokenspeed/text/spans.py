"""A rendered prompt as spans: each says whether its text came from the template or from the request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a prompt. Special tokens are recognised only where `from_request` is False."""

    text: str
    from_request: bool


def template_runs(spans: Iterable[Span]) -> Iterator[tuple[int, int]]:
    """Where template text stands in the joined string: (start, end) of each longest run, in order.

    Empty spans separate nothing: what counts is the text that stands there.
    """
    start = end = 0
    for span in spans:
        if not span.text:
            continue
        if span.from_request:
            if start < end:
                yield start, end
            start = end = end + len(span.text)
        else:
            end += len(span.text)
    if start < end:
        yield start, end


def template_end(spans: Iterable[Span]) -> str:
    """What the template wrote after the last text of the request: how it begins the answer."""
    end = ""
    for span in spans:
        end = "" if span.from_request and span.text else end + ("" if span.from_request else span.text)
    return end
