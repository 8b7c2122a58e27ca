"""chat.completion and chat.completion.chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenspeed.entrypoints.answers import Gathered, TokenTexts, Usage, encode, event, prompt_logprobs_json, token_text
from tokenspeed.entrypoints.schema import Delivery
from tokenspeed.request import RequestOutput, SamplingParams, TokenLogprob


class ChatAnswer:
    """Writes the answer of one chat request. The usual event is a byte template around the encoded text."""

    def __init__(
        self,
        *,
        id: str,
        created: int,
        delivery: Delivery,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        texts: TokenTexts,
    ) -> None:
        self._base = {"id": id, "created": created, "model": delivery.model}
        self._usage_null = delivery.stream and delivery.include_usage
        self._token_ids = delivery.return_token_ids
        self._logprobs = params.logprobs is not None
        self._prompt_logprobs = params.prompt_logprobs is not None
        self._prompt_token_ids = prompt_token_ids
        self._texts = texts
        self._started: set[int] = set()
        self._plain = not self._token_ids and not self._logprobs
        marker = "\x00text\x00"
        template = event(
            self._chunk({"index": 0, "delta": {"content": marker}, "logprobs": None, "finish_reason": None})
        )
        before, self._tail = template.split(encode(marker))
        self._heads = [before.replace(b'"index":0,', b'"index":%d,' % index) for index in range(params.n)]

    def event(self, index: int, output: RequestOutput) -> bytes:
        """See `Answer`."""
        first = index not in self._started
        if self._plain and output.finish_reason is None:
            if not output.text:
                return b""
            if not first:
                return b"%b%b%b" % (self._heads[index], encode(output.text), self._tail)
        delta: dict[str, Any] = {}
        if first:
            self._started.add(index)
            delta["role"] = "assistant"
        if output.text or first:
            delta["content"] = output.text
        choice: dict[str, Any] = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs_json(output.logprobs or ()),
            "finish_reason": output.finish_reason,
        }
        if output.finish_reason is not None:
            choice["stop_reason"] = output.stop_reason
        if self._token_ids:
            choice["token_ids"] = output.token_ids
        chunk = self._chunk(choice)
        if self._token_ids and first:
            chunk["prompt_token_ids"] = self._prompt_token_ids
        return event(chunk)

    def usage_event(self, usage: Usage) -> bytes:
        """See `Answer`."""
        base = {**self._base, "object": "chat.completion.chunk"}
        return event({**base, "choices": [], "usage": usage.as_json()})

    def whole(self, choices: list[Gathered], usage: Usage) -> bytes:
        """See `Answer`."""
        body: dict[str, Any] = {
            **self._base,
            "object": "chat.completion",
            "choices": [self._choice(choice) for choice in choices],
            "usage": usage.as_json(),
        }
        if self._prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs_json(choices[0].prompt_logprobs, self._texts)
        if self._token_ids:
            body["prompt_token_ids"] = self._prompt_token_ids
        return encode(body)

    def _choice(self, choice: Gathered) -> dict[str, Any]:
        result: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.texts)},
            "logprobs": self._logprobs_json(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._token_ids:
            result["token_ids"] = choice.token_ids
        return result

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._base, "object": "chat.completion.chunk", "choices": [choice]}
        if self._usage_null:
            chunk["usage"] = None
        return chunk

    def _logprobs_json(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        content = []
        for entry in entries:
            item = self._token_json(entry.token_id, entry.logprob)
            top = zip(entry.top_ids, entry.top_logprobs, strict=True)
            item["top_logprobs"] = [self._token_json(token_id, logprob) for token_id, logprob in top]
            content.append(item)
        return {"content": content}

    def _token_json(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._texts.token_bytes(token_id)
        return {"token": token_text(self._texts, token_id), "logprob": logprob, "bytes": list(raw)}
