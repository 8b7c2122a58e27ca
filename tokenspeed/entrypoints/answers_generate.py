"""SGLang's answer: the whole text so far with each event, and what is known of the request in `meta_info`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from tokenspeed.entrypoints.answers import Gathered, OpenAIEvents, TokenTexts, Usage, encode, event, token_text
from tokenspeed.entrypoints.schema_generate import GenerateRequest
from tokenspeed.request import RequestOutput, TokenLogprob


class _SoFar:
    """What a choice has so far, as JSON that only grows.

    Each event repeats all of it; encoding it anew took the event loop 22 ms an event after 1,000 tokens with 20
    alternatives each, and as much more after each further 1,000.
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._text, self._ids, self._logprobs, self._tops = bytearray(), bytearray(), bytearray(), bytearray()

    def add(self, text: str, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> None:
        """Take in what came."""
        self._text += encode(text)[1:-1]
        _extend(self._ids, token_ids)
        _extend(self._logprobs, [self._entry(one.logprob, one.token_id) for one in logprobs])
        _extend(self._tops, [list(map(self._entry, one.top_logprobs, one.top_ids)) for one in logprobs])

    @property
    def text(self) -> msgspec.Raw:
        """The whole text."""
        return msgspec.Raw(b"".join((b'"', self._text, b'"')))

    @property
    def ids(self) -> msgspec.Raw:
        """All tokens."""
        return msgspec.Raw(b"".join((b"[", self._ids, b"]")))

    @property
    def logprobs(self) -> msgspec.Raw:
        """For each of them its log-probability, id and text."""
        return msgspec.Raw(b"".join((b"[", self._logprobs, b"]")))

    @property
    def tops(self) -> msgspec.Raw:
        """For each of them the same of its alternatives."""
        return msgspec.Raw(b"".join((b"[", self._tops, b"]")))

    def _entry(self, logprob: float, token_id: int) -> tuple[float, int, str]:
        return logprob, token_id, token_text(self._texts, token_id)


class GenerateAnswer(OpenAIEvents):
    """Writes the answer of one /generate request; choices are numbered prompt by prompt.

    `elapsed` gives the seconds since the request arrived.
    """

    def __init__(
        self,
        *,
        id: str,
        request: GenerateRequest,
        prompt_tokens: Sequence[int],
        texts: TokenTexts,
        elapsed: Callable[[], float],
    ) -> None:
        super().__init__(None)
        self._id = id
        self._request = request
        self._prompt_tokens = prompt_tokens
        self._elapsed = elapsed
        count = len(prompt_tokens) * request.params.n
        self._gathered = [Gathered(index) for index in range(count)]
        self._so_far = [_SoFar(texts) for _ in range(count)]

    def event(self, index: int, output: RequestOutput) -> bytes:
        """See `Answer`."""
        choice = self._gathered[index]
        choice.add(output)
        self._so_far[index].add(output.text, output.token_ids, output.logprobs or ())
        payload = self._choice(choice)
        if self._request.batched:
            payload["index"] = index
        return event(payload)

    def whole(self, choices: list[Gathered], usage: Usage) -> bytes:
        """See `Answer`."""
        for choice in choices:
            self._so_far[choice.index].add("".join(choice.texts), choice.token_ids, choice.logprobs)
        if not self._request.batched:
            return encode(self._choice(choices[0]))
        return encode([self._choice(choice) for choice in choices])

    def _choice(self, choice: Gathered) -> dict[str, Any]:
        so_far = self._so_far[choice.index]
        meta: dict[str, Any] = {
            "id": self._id if not self._request.batched else f"{self._id}-{choice.index}",
            "finish_reason": _finish_reason(choice),
            "prompt_tokens": self._prompt_tokens[choice.index // self._request.params.n],
            "completion_tokens": len(choice.token_ids),
            "cached_tokens": choice.num_cached_tokens,
        }
        if choice.finish_reason is not None:
            meta["e2e_latency"] = self._elapsed()
        if self._request.params.logprobs is not None:
            meta["output_token_logprobs"] = so_far.logprobs
            if self._request.params.logprobs:
                meta["output_top_logprobs"] = so_far.tops
        return {"text": so_far.text, "output_ids": so_far.ids, "meta_info": meta}


def _extend(array: bytearray, values: Sequence[Any]) -> None:
    """Put values at the end of the inside of a JSON array."""
    if values:
        array += (b"," if array else b"") + encode(values)[1:-1]


def _finish_reason(choice: Gathered) -> dict[str, Any] | None:
    match choice.finish_reason:
        case None:
            return None
        case "length":
            return {"type": "length", "length": len(choice.token_ids)}
        case "stop":
            return {"type": "stop", "matched": choice.stop_reason}
        case reason:
            return {"type": reason}
