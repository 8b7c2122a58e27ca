"""What a request changes in its logits that no table can say, and whether its history counts."""

from __future__ import annotations

from collections.abc import Sequence

from tokenspeed.batch import Int32Array
from tokenspeed.request import SamplingParams


class BadWords:
    """Token sequences that one request must not produce, ordered so that a step looks up one tuple a length.

    A sequence's last token is banned while the known tokens, prompt included, end with the rest of it.
    """

    def __init__(self, sequences: Sequence[tuple[int, ...]], tokens: Int32Array) -> None:
        self._banned: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for *prefix, last in sequences:
            by_prefix = self._banned.setdefault(len(prefix), {})
            by_prefix.setdefault(tuple(prefix), []).append(last)
        self._longest = max(self._banned)
        self._tail: list[int] = tokens[max(0, len(tokens) - self._longest) :].tolist()

    def append(self, token: int) -> None:
        self._tail.append(token)
        del self._tail[: max(0, len(self._tail) - self._longest)]

    def banned(self) -> list[int]:
        """Tokens that must not come next."""
        ids: list[int] = []
        for length, by_prefix in self._banned.items():
            if length <= len(self._tail):
                ids += by_prefix.get(tuple(self._tail[len(self._tail) - length :]), ())
        return ids


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
