"""The text of one choice as the client sees it: cut at stop strings, never showing a part of one."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

import msgspec

from tokenspeed.request import SamplingParams
from tokenspeed.text.detokenizer import Detokenizer
from tokenspeed.text.tokenizer import Tokenizer


class TextDelta(msgspec.Struct, frozen=True):
    """What some tokens added: `text` to show now, and `num_tokens`, the tokens of the choice so far.

    `stop` is the stop string that ended the choice; `num_tokens` then counts up to the token that
    completed it, which is what the engine's `finish` is told, and no later delta adds anything.
    """

    text: str
    num_tokens: int
    stop: str | None


class StopStrings:
    """Finds the first of several strings in a text that comes in parts (Aho and Corasick, 1975).

    A state is the longest end of the text so far that begins a stop string; `depth[state]` is its length,
    `found[state]` the longest stop string that ends there. The cost a character does not depend on the
    number or the length of the strings.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.first = frozenset(text[0] for text in stop)
        self.depth = [0]
        self.found: list[str | None] = [None]
        self._next: list[dict[str, int]] = [{}]
        for text in stop:
            state = 0
            for character in text:
                if character not in self._next[state]:
                    self._next[state][character] = len(self.depth)
                    self.depth.append(self.depth[state] + 1)
                    self.found.append(None)
                    self._next.append({})
                state = self._next[state][character]
            self.found[state] = text
        self._fall = [0] * len(self.depth)
        queue = list(self._next[0].values())
        for state in queue:
            for character, child in self._next[state].items():
                self._fall[child] = self.advance(self._fall[state], character)
                if self.found[child] is None:
                    self.found[child] = self.found[self._fall[child]]
                queue.append(child)

    def passed(self, state: int) -> int:
        """The state after a match that does not count: nothing that only led to it is held back any longer."""
        return state if self._next[state] else self._fall[state]

    def advance(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self._next[state]:
            state = self._fall[state]
        return self._next[state].get(character, 0)


stop_strings = lru_cache(maxsize=64)(StopStrings)


class NoText:
    """In the place of `OutputText` for a choice whose text nobody wants: counts its tokens."""

    stops = ""
    rest = None

    def __init__(self) -> None:
        self._num_tokens = 0

    def feed(self, token_ids: Sequence[int], finished: bool = False) -> TextDelta:
        """Count tokens."""
        self._num_tokens += len(token_ids)
        return TextDelta("", self._num_tokens, None)

    def passed(self, token_ids: Sequence[int]) -> str:
        """Count tokens."""
        return self.feed(token_ids).text


class OutputText:
    """Turns the tokens of one choice into what its client may see.

    The match that is complete first wins, the longest of those that end together, whatever the tokens'
    borders are. Text that may begin a stop string is held back until that is decided. A match completed
    within the first `min_tokens` tokens does not count. `eos_token_ids` are those that end this model's
    turns (None: the tokenizer's own). `continues` is the detokenizer's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        eos_token_ids: Collection[int] | None = None,
        continues: bool = False,
    ) -> None:
        if eos_token_ids is None:
            eos_token_ids = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self._ending_ids = frozenset(params.stop_token_ids).union(() if params.ignore_eos else eos_token_ids)
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=params.skip_special_tokens,
            shown_ids=params.shown_special_ids,
            continues=continues,
        )
        self._stops = stop_strings(params.stop)
        self.stops = "".join(sorted(self._stops.first))
        """The characters with which a stop string may begin."""
        self._min_tokens = params.min_tokens
        self._shows_stop = params.include_stop_str_in_output
        self._held = ""
        self._state = 0
        self._num_tokens = 0
        self._stop: str | None = None

    def feed(self, token_ids: Sequence[int], finished: bool = False) -> TextDelta:
        """Add tokens. With `finished` these were the last and held-back text is let go.

        A stop token or end-of-sequence that is the last token of all counts, but its text is dropped,
        unless `include_stop_str_in_output`.
        """
        if not finished and not self._stops.first:  # nearly every token
            self._num_tokens += len(token_ids)
            return TextDelta(self._detokenizer.feed(token_ids), self._num_tokens, None)
        if self._stop is not None:
            return TextDelta("", self._num_tokens, self._stop)
        ids = list(token_ids)
        dropped = int(finished and bool(ids) and ids[-1] in self._ending_ids and not self._shows_stop)
        shown: list[str] = []
        if self._stops.first:
            for token_id in ids[: len(ids) - dropped]:
                self._num_tokens += 1
                text = self._detokenizer.feed((token_id,))
                if text and self._add(text, shown):
                    return TextDelta("".join(shown), self._num_tokens, self._stop)
            self._num_tokens += dropped
        else:
            shown.append(self._detokenizer.feed(ids[: len(ids) - dropped]))
            self._num_tokens += len(ids)
        if finished and not self._add(self._detokenizer.flush(), shown):
            shown.append(self._held)
            self._held, self._state = "", 0
        return TextDelta("".join(shown), self._num_tokens, self._stop)

    @property
    def rest(self) -> bytes | None:
        """The bytes of the character that is incomplete; None if anything else is held back, or shown in another way.

        If not, what tokens complete would be shown as it is, as long as none of it is in `stops`.
        """
        return None if self._state or self._stop is not None else self._detokenizer.rest

    def passed(self, token_ids: Sequence[int]) -> str:
        """Take in tokens that were shown without being fed, while there was a `rest`; gives their text."""
        self._num_tokens += len(token_ids)
        return self._detokenizer.feed(token_ids)

    def _add(self, text: str, shown: list[str]) -> bool:
        """Add text that the latest token completed; True if a stop string ended the choice in it."""
        stops = self._stops
        if not self._state and stops.first.isdisjoint(text):
            shown.append(text)
            return False
        text = self._held + text
        state = self._state
        for index in range(len(self._held), len(text)):
            state = stops.advance(state, text[index])
            stop = stops.found[state]
            if stop is None:
                continue
            if self._num_tokens <= self._min_tokens:
                state = stops.passed(state)
            else:
                end = index + 1
                shown.append(text[: end if self._shows_stop else end - len(stop)])
                self._held, self._stop = "", stop
                return True
        visible = len(text) - stops.depth[state]
        shown.append(text[:visible])
        self._held, self._state = text[visible:], state
        return False
