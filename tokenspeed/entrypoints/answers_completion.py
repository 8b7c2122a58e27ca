"""text_completion, whole and as events, with the prompt echoed where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenspeed.engine.lane import Frame, Way
from tokenspeed.entrypoints.answers import (
    Gathered,
    OpenAIEvents,
    TokenTexts,
    Usage,
    encode,
    event,
    prompt_logprobs_json,
    token_text,
)
from tokenspeed.entrypoints.schema_completion import CompletionRequest
from tokenspeed.request import RequestOutput, TokenLogprob


class CompletionAnswer(OpenAIEvents):
    """Writes the answer of one completion request; choices are numbered prompt by prompt.

    `prompt_texts` has the text of each prompt, empty without echo.
    """

    def __init__(
        self,
        *,
        id: str,
        created: int,
        request: CompletionRequest,
        prompt_token_ids: Sequence[Sequence[int]],
        prompt_texts: Sequence[str],
        texts: TokenTexts,
    ) -> None:
        delivery = request.delivery
        self._base = {"id": id, "object": "text_completion", "created": created, "model": delivery.model}
        self._usage_null = delivery.stream and delivery.include_usage
        super().__init__(self._base if self._usage_null else None)
        self._token_ids = delivery.return_token_ids
        self._logprobs = request.params.logprobs
        self._prompt_logprobs = request.shows_prompt_logprobs
        self._echo = request.echo
        self._n = request.params.n
        self._prompt_token_ids = prompt_token_ids
        self._prompt_texts = prompt_texts
        self._texts = texts
        self._offsets: dict[int, int] = {}
        self._plain = not self._token_ids and self._logprobs is None
        marker = "\x00text\x00"
        template = event(self._chunk({"index": 0, "text": marker, "logprobs": None, "finish_reason": None}))
        before, self._tail = template.split(encode(marker))
        count = len(prompt_token_ids) * self._n
        self._ways: dict[int, Way] = {}
        self._heads = [before.replace(b'"index":0,', b'"index":%d,' % index) for index in range(count)]

    def event(self, index: int, output: RequestOutput) -> bytes:
        """See `Answer`."""
        first = index not in self._offsets
        if self._plain and output.finish_reason is None and not (first and self._echo):
            if not output.text:
                return b""
            self._offsets[index] = 0
            return b"%b%b%b" % (self._heads[index], encode(output.text), self._tail)
        echoes = first and self._echo
        offset = self._offsets.get(index, 0)
        prompt = index // self._n
        entries: list[TokenLogprob | None] = self._echoed(output.prompt_logprobs, prompt) if echoes else []
        entries += output.logprobs or ()
        logprobs, self._offsets[index] = self._logprobs_json(entries, prompt if echoes else None, offset)
        choice: dict[str, Any] = {
            "index": index,
            "text": (self._prompt_texts[prompt] if echoes else "") + output.text,
            "logprobs": logprobs,
            "finish_reason": output.finish_reason,
        }
        if output.finish_reason is not None:
            choice["stop_reason"] = output.stop_reason
        if self._token_ids:
            choice["token_ids"] = output.token_ids
            if first:
                choice["prompt_token_ids"] = self._prompt_token_ids[prompt]
        return event(self._chunk(choice))

    def way(self, index: int) -> tuple[Way, int] | None:
        """See `Answer`."""
        if not self._plain or index not in self._offsets:
            return None
        way = self._ways.get(index)
        if way is None:
            way = self._ways[index] = Way(Frame(self._heads[index], self._tail), "", False)
        return way, 0

    def whole(self, choices: list[Gathered], usage: Usage) -> bytes:
        """See `Answer`."""
        return encode({**self._base, "choices": [self._choice(choice) for choice in choices], "usage": usage.as_json()})

    def _choice(self, choice: Gathered) -> dict[str, Any]:
        prompt = choice.index // self._n
        entries: list[TokenLogprob | None] = self._echoed(choice.prompt_logprobs, prompt) if self._echo else []
        entries += choice.logprobs
        result: dict[str, Any] = {
            "index": choice.index,
            "text": (self._prompt_texts[prompt] if self._echo else "") + "".join(choice.texts),
            "logprobs": self._logprobs_json(entries, prompt if self._echo else None, 0)[0],
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._prompt_logprobs:
            result["prompt_logprobs"] = prompt_logprobs_json(choice.prompt_logprobs, self._texts)
        if self._token_ids:
            result["token_ids"] = choice.token_ids
            result["prompt_token_ids"] = self._prompt_token_ids[prompt]
        return result

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._base, "choices": [choice]}
        if self._usage_null:
            chunk["usage"] = None
        return chunk

    def _echoed(self, entries: list[TokenLogprob | None] | None, prompt: int) -> list[TokenLogprob | None]:
        """The echoed prompt's entries; a prompt of one token has nothing to score, and still is one token."""
        return list(entries or ([None] if len(self._prompt_token_ids[prompt]) == 1 else ()))

    def _logprobs_json(
        self, entries: Sequence[TokenLogprob | None], echoed: int | None, offset: int
    ) -> tuple[dict[str, Any] | None, int]:
        """OpenAI's old shape. An entry that is None is the first token of prompt `echoed`.

        `offset` is where the first token's text begins; the second result is where the next one will.
        """
        if self._logprobs is None:
            return None, offset
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            if entry is None:
                assert echoed is not None
                text = token_text(self._texts, self._prompt_token_ids[echoed][0])
                values.append(None)
                tops.append(None)
            else:
                text = token_text(self._texts, entry.token_id)
                values.append(entry.logprob)
                top = list(zip(entry.top_ids, entry.top_logprobs, strict=True))[: self._logprobs]
                best = {token_text(self._texts, token_id): logprob for token_id, logprob in top}
                best.setdefault(text, entry.logprob)
                tops.append(best)
            tokens.append(text)
            offsets.append(offset)
            offset += len(text)
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}, offset
