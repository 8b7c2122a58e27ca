"""What is told of an answer: deltas that add up to it, and one end for each choice."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb

from tokenspeed.entrypoints.grpc.asked import Asked, Terms
from tokenspeed.entrypoints.grpc.told import Told
from tokenspeed.request import RequestOutput, SamplingParams, TokenLogprob

EOS = 2


def told(*, stream: bool = True, keeps_stop: bool = False) -> Told:
    asked = Asked("r", array("i", [1]), SamplingParams(), Terms(), stream, keeps_stop)
    return Told(asked, frozenset({EOS}))


def output(*ids: int, total: int = 0, **fields: Any) -> RequestOutput:
    """Of an answer to seven tokens, three of them cached."""
    return RequestOutput(
        request_id="inner", token_ids=list(ids), num_output_tokens=total, num_prompt_tokens=7, num_cached_tokens=3,
        **fields,
    )  # fmt: skip


def logprobs(*ids: int) -> list[TokenLogprob]:
    return [TokenLogprob(id, -float(id), 1, (id, id + 1), (-float(id), -9.0)) for id in ids]


def kinds(messages: list[pb.GenerateResponse]) -> list[str | None]:
    assert all(message.request_id == "r" for message in messages)
    return [message.WhichOneof("response") for message in messages]


def end(messages: list[pb.GenerateResponse]) -> pb.GenerateComplete:
    assert kinds(messages)[-1] == "complete"
    return messages[-1].complete


def test_chunks_are_deltas_and_the_end_repeats_none_of_them() -> None:
    it = told()
    messages = it.messages([output(10, total=1)])
    messages += it.messages([output(11, 12, total=3), output(13, total=4)])
    messages += it.messages([output(14, total=5, finish_reason="length")])
    assert kinds(messages) == ["chunk", "chunk", "chunk", "complete"]
    assert [list(message.chunk.token_ids) for message in messages[:3]] == [[10], [11, 12, 13], [14]]
    assert [message.chunk.completion_tokens for message in messages[:3]] == [1, 4, 5]
    assert {(message.chunk.prompt_tokens, message.chunk.cached_tokens) for message in messages[:3]} == {(7, 3)}
    last = end(messages)
    assert (list(last.output_ids), last.finish_reason) == ([], "length")
    assert (last.prompt_tokens, last.completion_tokens, last.cached_tokens) == (7, 5, 3)
    assert last.WhichOneof("matched_stop") is None


def test_an_answer_told_whole_has_all_its_ids_in_the_end_alone() -> None:
    it = told(stream=False)
    assert it.messages([output(10, total=1)]) == []
    assert it.messages([output(11, total=2)]) == []
    messages = it.messages([output(12, total=3, finish_reason="length")])
    assert kinds(messages) == ["complete"]
    assert list(end(messages).output_ids) == [10, 11, 12] and end(messages).completion_tokens == 3


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("stop_reason", "last", "kept"),
    [(None, EOS, False), (9, 9, False), (EOS, EOS, False), (None, 12, True), ("###", 12, True), ("###", EOS, True)],
)
def test_the_token_that_ended_an_answer_is_dropped_and_nothing_else(
    stream: bool, stop_reason: int | str | None, last: int, kept: bool
) -> None:
    outputs = [output(10, total=1), output(11, last, total=3, finish_reason="stop", stop_reason=stop_reason)]
    messages = told(stream=stream).messages(outputs)
    found = messages[0].chunk.token_ids if stream else end(messages).output_ids
    assert list(found) == [10, 11, last][: 3 if kept else 2]
    assert end(messages).completion_tokens == 3, "it was computed all the same"


@pytest.mark.parametrize("stop_reason", [None, EOS])
def test_it_stays_where_it_is_wanted(stop_reason: int | None) -> None:
    messages = told(keeps_stop=True).messages([output(10, EOS, total=2, finish_reason="stop", stop_reason=stop_reason)])
    assert list(messages[0].chunk.token_ids) == [10, EOS]


def test_only_a_stop_drops_a_token() -> None:
    messages = told().messages([output(10, EOS, total=2, finish_reason="length")])
    assert list(messages[0].chunk.token_ids) == [10, EOS]


def test_what_matched_is_told() -> None:
    by_id = end(told().messages([output(9, total=1, finish_reason="stop", stop_reason=9)]))
    assert by_id.WhichOneof("matched_stop") == "matched_token_id" and by_id.matched_token_id == 9
    by_text = end(told().messages([output(9, total=1, finish_reason="stop", stop_reason="###")]))
    assert by_text.WhichOneof("matched_stop") == "matched_stop_str" and by_text.matched_stop_str == "###"
    by_end = end(told().messages([output(EOS, total=1, finish_reason="stop")]))
    assert by_end.WhichOneof("matched_stop") is None and by_end.finish_reason == "stop"


def test_an_id_of_0_that_matched_is_told_too() -> None:
    last = end(told().messages([output(0, total=1, finish_reason="stop", stop_reason=0)]))
    assert last.WhichOneof("matched_stop") == "matched_token_id" and last.matched_token_id == 0


def test_an_end_without_tokens_is_no_chunk() -> None:
    it = told()
    it.messages([output(10, total=1)])
    assert kinds(it.messages([output(EOS, total=2, finish_reason="stop")])) == ["complete"]
    assert kinds(told().messages([output(finish_reason="abort")])) == ["complete"]
    assert end(told().messages([output(finish_reason="abort")])).finish_reason == "abort"


@pytest.mark.parametrize("stream", [True, False])
def test_there_is_one_log_probability_for_each_id_that_is_told(stream: bool) -> None:
    it = told(stream=stream)
    messages = it.messages([output(10, 11, total=2, logprobs=logprobs(10, 11))])
    ending = output(12, EOS, total=4, finish_reason="stop", logprobs=logprobs(12, EOS))
    messages += it.messages([ending])
    if stream:
        assert kinds(messages) == ["chunk", "chunk", "complete"] and not messages[2].complete.HasField(
            "output_logprobs"
        )
    parts = [message.chunk if stream else message.complete for message in messages[: 2 if stream else 1]]
    assert [id for part in parts for id in part.output_logprobs.token_ids] == [10, 11, 12]
    assert [value for part in parts for value in part.output_logprobs.token_logprobs] == [-10.0, -11.0, -12.0]
    tops = [top for part in parts for top in part.output_logprobs.top_logprobs]
    assert [list(top.token_ids) for top in tops] == [[10, 11], [11, 12], [12, 13]]
    assert [list(top.values) for top in tops] == [[-10.0, -9.0], [-11.0, -9.0], [-12.0, -9.0]]


def test_without_log_probabilities_there_is_no_place_for_them() -> None:
    messages = told().messages([output(10, total=1, finish_reason="length")])
    assert not messages[0].chunk.HasField("output_logprobs") and not messages[1].complete.HasField("output_logprobs")


def test_choices_are_told_apart_and_each_ends_once() -> None:
    it = told()
    messages = it.messages([output(10, total=1, index=0), output(20, total=1, index=1), output(11, total=2, index=0)])
    assert [(message.chunk.index, list(message.chunk.token_ids)) for message in messages] == [(0, [10, 11]), (1, [20])]
    messages = it.messages([
        output(21, total=2, index=1, finish_reason="length"),
        output(12, total=3, index=0),
    ])  # fmt: skip
    assert [(kind, message.chunk.index + message.complete.index) for kind, message in zip(
        kinds(messages), messages, strict=True
    )] == [("chunk", 1), ("complete", 1), ("chunk", 0)]  # fmt: skip
    messages = it.messages([output(EOS, total=4, index=0, finish_reason="stop")])
    assert kinds(messages) == ["complete"]
    assert (messages[0].complete.index, messages[0].complete.completion_tokens) == (0, 4)


def test_choices_told_whole_keep_their_own_ids() -> None:
    it = told(stream=False)
    it.messages([output(10, total=1, index=0), output(20, total=1, index=1)])
    (first,) = it.messages([output(11, total=2, index=1, finish_reason="length")])
    (second,) = it.messages([output(12, total=2, index=0, finish_reason="length")])
    assert (first.complete.index, list(first.complete.output_ids)) == (1, [20, 11])
    assert (second.complete.index, list(second.complete.output_ids)) == (0, [10, 12])
