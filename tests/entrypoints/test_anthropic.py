"""POST /v1/messages and count_tokens: what a client is told, whole and streamed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.entrypoints.fake_engine import EOS
from tests.entrypoints.messages_api import COUNT, MESSAGES, USER, assembled, message, problem, told
from tests.entrypoints.served import Served, serving
from tests.entrypoints.test_tool_calls import CALL, qwen3, saying
from tests.text.parsers.cases import ALL, TOOLS
from tokenspeed.entrypoints.limits import Limits
from tokenspeed.text.parsers.choose import TOOL_PARSERS

OFFERED: list[Any] = [
    {"name": name, "description": "it", "input_schema": schema, "cache_control": {"type": "ephemeral"}}
    for name, schema in TOOLS.items()
]
CITY = {"city": "Paris"}


@pytest.fixture(scope="module")
def thinker() -> Iterator[Served]:
    """A model that thinks and calls tools."""
    with serving(template=qwen3(), max_model_len=8192) as it:
        yield it


def whole(served: Served, **fields: Any) -> dict[str, Any]:
    reply = served.post(MESSAGES, message(**fields))
    assert reply.status == 200, reply.text
    return dict(reply.json())


def streamed(served: Served, **fields: Any) -> dict[str, Any]:
    reply = served.post(MESSAGES + "?beta=true", message(stream=True, **fields))
    assert reply.status == 200, reply.text
    return assembled(told(reply.text))


def both(served: Served, **fields: Any) -> dict[str, Any]:
    """The answer, which must be the same whole and streamed but for ids."""
    first, second = whole(served, **fields), streamed(served, **fields)
    for answer in (first, second):
        assert answer.pop("id").startswith("msg_")
        assert (answer.pop("type"), answer.pop("role"), answer.pop("model")) == ("message", "assistant", "echo")
        for block in answer["content"]:
            assert block["type"] != "tool_use" or block.pop("id")
    assert first == second
    return first


def test_a_text_is_one_block_that_ends_with_the_limit(served: Served) -> None:
    answer = both(served, messages=[{"role": "user", "content": "grüße 👋"}], max_tokens=18)
    assert answer["content"] == [{"type": "text", "text": "user:grüße 👋"}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("max_tokens", None)
    assert answer["usage"]["output_tokens"] == 18


def test_one_event_a_token_and_none_for_half_a_character(served: Served) -> None:
    reply = served.post(MESSAGES, message(stream=True, messages=[{"role": "user", "content": "a👋b"}], max_tokens=12))
    texts = [event["delta"]["text"] for event in told(reply.text) if event["type"] == "content_block_delta"]
    assert texts == [*"user:a", "👋", "b"]


def test_a_stop_sequence_ends_an_answer_and_is_named(served: Served) -> None:
    answer = both(served, stop_sequences=["zz", ":"])
    assert answer["content"] == [{"type": "text", "text": "user"}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", ":")


def test_the_end_of_the_models_turn_is_end_turn_even_if_it_said_nothing(thinker: Served) -> None:
    with saying(thinker, "Done."):
        answer = both(thinker, max_tokens=100)
    assert (answer["content"], answer["stop_reason"]) == ([{"type": "text", "text": "Done."}], "end_turn")
    with saying(thinker, EOS):
        answer = both(thinker, max_tokens=100)
    assert (answer["content"], answer["stop_reason"]) == ([], "end_turn")


def test_thinking_text_and_calls_are_blocks_of_their_own(thinker: Served) -> None:
    with saying(thinker, f"<think>\nLook outside.\n</think>\n\nOne moment.\n{CALL}\n{CALL}"):
        answer = both(thinker, tools=OFFERED, max_tokens=1000)
    thinking = answer["content"].pop(0)
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "Look outside.") and thinking["signature"]
    assert answer["content"] == [
        {"type": "text", "text": "One moment."},
        {"type": "tool_use", "name": "get_weather", "input": CITY},
        {"type": "tool_use", "name": "get_weather", "input": CITY},
    ]
    assert answer["stop_reason"] == "tool_use"
    thought = answer["usage"]["output_tokens_details"]["thinking_tokens"]
    assert len("<think>Look outside.") <= thought <= len("<think>\nLook outside.\n</think>\n\n")


def test_thinking_that_is_not_to_be_shown_leaves_its_signature(thinker: Served) -> None:
    with saying(thinker, "<think>\nLook outside.\n</think>\n\nRain."):
        answer = both(thinker, thinking={"type": "adaptive", "display": "omitted"}, max_tokens=100)
    assert [block.get("thinking") for block in answer["content"]] == ["", None]
    assert answer["content"][0]["signature"]


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_calls_of_every_format_are_objects_whole_and_as_they_are_streamed(name: str) -> None:
    with serving(template=qwen3(), tool_call_parser=name, max_model_len=8192) as served:
        for case in (case for case in ALL if case.parser == name):
            with saying(served, case.text):
                answer = whole(served, tools=OFFERED, max_tokens=1000)
                reply = served.post(MESSAGES, message(stream=True, tools=OFFERED, max_tokens=1000))
            calls = [block for block in answer["content"] if block["type"] == "tool_use"]
            assert [call["name"] for call in calls] == [call[0] for call in case.calls], case.name
            assert all(isinstance(call["input"], dict) for call in calls), case.name
            fragments: dict[int, str] = {}
            for event in told(reply.text):
                if event["type"] == "content_block_start" and event["content_block"]["type"] == "tool_use":
                    fragments[event["index"]] = ""
                elif event["type"] == "content_block_delta" and event["index"] in fragments:
                    fragments[event["index"]] += event["delta"]["partial_json"]
            assert list(fragments.values()) == [arguments for _, arguments in case.calls], case.name
            for call, (_, arguments) in zip(calls, case.calls, strict=True):
                try:
                    expected = json.loads(arguments)
                except ValueError:
                    continue
                assert call["input"] == expected or not isinstance(expected, dict), case.name


def test_a_call_that_the_limit_cuts_off_has_what_was_complete(thinker: Served) -> None:
    with saying(thinker, CALL):
        answer = whole(thinker, tools=OFFERED, max_tokens=CALL.index("Par") + 3)
    assert answer["content"][0]["input"] == {"city": "Par"}
    assert answer["stop_reason"] == "max_tokens"


def test_only_the_first_call_counts_where_only_one_is_wanted(thinker: Served) -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    with saying(thinker, CALL * 2):
        answer = both(thinker, tools=OFFERED, tool_choice=choice, max_tokens=1000)
    assert [block["type"] for block in answer["content"]] == ["tool_use"]
    assert answer["stop_reason"] == "tool_use"


def test_no_tools_no_calls(thinker: Served) -> None:
    with saying(thinker, CALL):
        answer = both(thinker, tools=OFFERED, tool_choice={"type": "none"}, max_tokens=1000)
    assert (answer["content"], answer["stop_reason"]) == ([{"type": "text", "text": CALL}], "end_turn")


def test_cached_tokens_are_told_at_once_and_counted_apart(served: Served) -> None:
    served.call(lambda: setattr(served.engine, "cached", 7))
    try:
        usage = both(served)["usage"]
        start = told(served.post(MESSAGES, message(stream=True)).text)[0]["message"]["usage"]
    finally:
        served.call(lambda: setattr(served.engine, "cached", 0))
    prompt = served.post(COUNT, message()).json()["input_tokens"]
    expected = {"input_tokens": prompt - 7, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 0}
    assert usage == {**expected, "output_tokens": 8}
    assert start == {**expected, "output_tokens": 1}


def test_counting_sees_the_prompt_that_would_be_answered(thinker: Served) -> None:
    body = message(system="Be brief.", tools=OFFERED, max_tokens=1, thinking={"type": "disabled"})
    assert thinker.post(MESSAGES, body).status == 200
    reply = thinker.post(COUNT, body)
    assert reply.json() == {"input_tokens": len(thinker.engine.submitted[-1]["ids"])}
    del body["max_tokens"]
    assert thinker.post(COUNT, body).text == reply.text


def test_a_limit_of_0_fills_the_cache_and_says_nothing(served: Served) -> None:
    answer = both(served, max_tokens=0)
    assert (answer["content"], answer["stop_reason"]) == ([], "max_tokens")
    assert answer["usage"]["output_tokens"] == 0


def test_a_limit_beyond_the_context_ends_with_the_context(served: Served) -> None:
    answer = both(served, max_tokens=32_000)
    assert answer["stop_reason"] == "model_context_window_exceeded"
    assert answer["usage"]["input_tokens"] + answer["usage"]["output_tokens"] == 512


def test_an_assistants_text_at_the_end_is_continued(served: Served, thinker: Served) -> None:
    prefill = {"role": "assistant", "content": "The answer is ("}
    with saying(thinker, "B)"):
        answer = both(thinker, messages=[USER, prefill], max_tokens=100)
    assert answer["content"] == [{"type": "text", "text": "B)"}]
    rendered = bytes(id for id in thinker.engine.submitted[-1]["ids"] if id < 256).decode()
    assert rendered.endswith("The answer is (")


def test_an_empty_assistant_at_the_end_is_none(served: Served) -> None:
    plain = both(served)
    for content in ("", [], None, [{"type": "text", "text": ""}], [{"type": "redacted_thinking", "data": "x"}]):
        assert both(served, messages=[USER, {"role": "assistant", "content": content}]) == plain


def test_pings_keep_a_started_stream_open_and_comments_one_that_waits() -> None:
    with serving(limits=Limits(keepalive_seconds=0.05)) as served:
        served.call(lambda: setattr(served.engine, "delay", 0.2))
        text = served.post(MESSAGES, message(stream=True, max_tokens=2)).text
    before, _, after = text.partition("event: message_start")
    assert before and set(before.split("\n\n")) == {": keep-alive", ""}
    assert after.count("event: ping") > 1 and ": keep-alive" not in after


def test_a_request_that_is_aborted_ends_with_an_error_and_no_stop_reason() -> None:
    with serving(admin_keys=("boss",)) as served:
        served.call(lambda: setattr(served.engine, "delay", 0.05))
        replies: list[Any] = []

        def ask(stream: bool) -> None:
            replies.append(served.post(MESSAGES, message(stream=stream, max_tokens=100), X_Request_Id="mine"))

        for stream in (False, True):
            running = threading.Thread(target=ask, args=[stream])
            running.start()
            served.wait_until(lambda: served.engine.generated > 0 and bool(served.engine.streams))
            assert served.post("/abort_request", {"request_id": "mine"}, Authorization="Bearer boss").status == 200
            running.join()
    assert replies[0].status == 500
    assert problem(replies[0])["type"] == "api_error"
    last = told(replies[1].text)[-1]
    assert (last["type"], last["error"]["type"], last["request_id"]) == ("error", "api_error", "mine")
    assert "message_delta" not in replies[1].text
