"""What is told of an answer: chunks of token ids, then one `complete` for each choice."""

from __future__ import annotations

from dataclasses import dataclass, field

from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed.entrypoints.grpc.asked import Asked
from tokenspeed.request import RequestOutput, TokenLogprob


@dataclass(slots=True)
class Gained:
    """What a choice has gained and nobody was told yet; the counts are those of the whole answer."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def add(self, output: RequestOutput, ids: list[int]) -> None:
        """`ids` are those of the output that are told."""
        self.token_ids += ids
        if output.logprobs is not None:
            self.logprobs += output.logprobs[: len(ids)]


class Told:
    """The messages of one call. Streamed, tokens that came together share a chunk; else all ids come at the end."""

    def __init__(self, asked: Asked, eos_token_ids: frozenset[int]) -> None:
        self._request_id = asked.request_id
        self._streams = asked.stream
        self._keeps_stop = asked.keeps_stop
        self._eos = eos_token_ids
        self._gained: dict[int, Gained] = {}

    def messages(self, outputs: list[RequestOutput]) -> list[pb.GenerateResponse]:
        """What to write now that these outputs came."""
        messages: list[pb.GenerateResponse] = []
        latest: dict[int, RequestOutput] = {}
        for output in outputs:
            self._gained.setdefault(output.index, Gained()).add(output, self._shown(output))
            latest[output.index] = output
        for index, output in latest.items():
            if self._streams and self._gained[index].token_ids:
                messages.append(self._chunk(output, self._gained.pop(index)))
            if output.finish_reason is not None:
                messages.append(self._complete(output, self._gained.pop(index, Gained())))
        return messages

    def _shown(self, output: RequestOutput) -> list[int]:
        """An output's ids, without the one that ended the choice."""
        ids = output.token_ids
        if output.finish_reason != "stop" or self._keeps_stop or not ids:
            return ids
        by_token = isinstance(output.stop_reason, int) or (output.stop_reason is None and ids[-1] in self._eos)
        return ids[:-1] if by_token else ids

    def _chunk(self, output: RequestOutput, gained: Gained) -> pb.GenerateResponse:
        return pb.GenerateResponse(
            request_id=self._request_id,
            chunk=pb.GenerateStreamChunk(
                token_ids=gained.token_ids,
                prompt_tokens=output.num_prompt_tokens,
                completion_tokens=output.num_output_tokens,
                cached_tokens=output.num_cached_tokens,
                output_logprobs=_logprobs(gained),
                index=output.index,
            ),
        )

    def _complete(self, output: RequestOutput, gained: Gained) -> pb.GenerateResponse:
        complete = pb.GenerateComplete(
            output_ids=gained.token_ids,
            finish_reason=output.finish_reason,
            prompt_tokens=output.num_prompt_tokens,
            completion_tokens=output.num_output_tokens,
            cached_tokens=output.num_cached_tokens,
            output_logprobs=_logprobs(gained),
            index=output.index,
        )
        if isinstance(output.stop_reason, int):
            complete.matched_token_id = output.stop_reason
        elif output.stop_reason is not None:
            complete.matched_stop_str = output.stop_reason
        return pb.GenerateResponse(request_id=self._request_id, complete=complete)


def _logprobs(gained: Gained) -> pb.OutputLogProbs | None:
    if not gained.logprobs:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[entry.logprob for entry in gained.logprobs],
        token_ids=[entry.token_id for entry in gained.logprobs],
        top_logprobs=[
            pb.TopLogProbs(values=entry.top_logprobs, token_ids=entry.top_ids) for entry in gained.logprobs
        ],
    )
