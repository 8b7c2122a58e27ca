"""How many of an answer's tokens were reasoning, counted as the answer is read."""

from __future__ import annotations

from collections.abc import Iterable

from tokenspeed.text.parsers.events import Event, Reasoning


class ThoughtTokens:
    """Tokens are reasoning from the first one on, if it begins a thinking, until other text comes."""

    def __init__(self) -> None:
        self.count = 0
        self._undecided = 0
        self._thinking: bool | None = None

    def add(self, events: Iterable[Event], num_tokens: int) -> None:
        """So many tokens came, and these are the events that they gave."""
        for event in events:
            thinks = isinstance(event, Reasoning)
            if thinks and self._thinking is None:
                self.count += self._undecided
            self._thinking = thinks
        if self._thinking:
            self.count += num_tokens
        elif self._thinking is None:
            self._undecided += num_tokens
