"""What a response request asks of the engine: items as messages, turns that repeat their history, tools, hints."""

from __future__ import annotations

import json
import logging
from typing import Any

import msgspec
import pytest

from tests.entrypoints import codex
from tests.entrypoints.served import Served, events, serving
from tests.entrypoints.test_tool_calls import qwen3, saying
from tokenspeed.entrypoints.limits import MAX_CALLS
from tokenspeed.entrypoints.schema import HINTS, Model
from tokenspeed.entrypoints.schema_chat import chat_request
from tokenspeed.entrypoints.schema_items import SKIPPED_ITEMS
from tokenspeed.entrypoints.schema_responses import OWN, responses_request
from tokenspeed.errors import InvalidRequest

ROUTE = "/v1/responses"
MODEL = Model(names=("echo",), max_model_len=4096, vocab_size=260, defaults={"temperature": 0.6})


class Nothing:
    def conversation(self, id: str) -> None:
        return None

    def item(self, id: str) -> None:
        return None


def parse(**fields: Any) -> Any:
    body = {"model": "echo", "input": "hello", **fields}
    return responses_request(json.dumps(body).encode(), MODEL, Nothing())


def messages(*items: Any, **fields: Any) -> Any:
    return parse(input=list(items), **fields).chat.conversation.messages


def spoken(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def thought(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def called(name: str = "f", id: str | None = "call_1", arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "id": "fc_1", "call_id": id, "name": name, "arguments": arguments}


def returned(output: Any, id: str | None = "call_1") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": id, "output": output}


def test_a_string_is_a_users_message_and_instructions_stand_before_it() -> None:
    assert parse().chat.conversation.messages == [spoken("user", "hello")]
    assert parse(instructions="Be brief.").chat.conversation.messages == [
        spoken("system", "Be brief."),
        spoken("user", "hello"),
    ]


def test_messages_come_in_easy_and_full_form_and_in_every_role() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    full = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "phase": "final_answer"}
    answer = {"type": "output_text", "text": "yes", "annotations": [], "logprobs": []}
    made = messages(spoken("user", "x"), spoken("user", parts), {**full, "content": [answer]}, spoken("system", "y"))
    assert made == [spoken("user", "x"), spoken("user", "ab"), spoken("assistant", "yes"), spoken("system", "y")]


def test_system_text_at_the_head_is_one_message_because_templates_know_only_one() -> None:
    made = messages(spoken("developer", "a"), spoken("system", "b"), spoken("user", "x"), instructions="c")
    assert made == [spoken("system", "c\n\na\n\nb"), spoken("user", "x")]


def test_what_an_assistant_does_in_one_turn_is_one_message() -> None:
    made = messages(
        spoken("user", "x"), thought("hm"), spoken("assistant", "One moment."), called("f", "1"), called("g", "2"),
        returned("a", "1"), returned([{"type": "input_text", "text": "b"}], "2"), thought("so"), called("f", "3"),
        returned("c", "3"), spoken("assistant", "Done."), spoken("user", "y"),
    )  # fmt: skip
    first, second, last = (message for message in made if message["role"] == "assistant")
    assert (first["reasoning_content"], first["content"]) == ("hm", "One moment.")
    assert [call["function"]["name"] for call in first["tool_calls"]] == ["f", "g"]
    assert (second["reasoning_content"], second["content"]) == ("so", None)
    assert last == spoken("assistant", "Done.")
    results = [(m["tool_call_id"], m["content"]) for m in made if m["role"] == "tool"]
    assert results == [("1", "a"), ("2", "b"), ("3", "c")]


def test_items_are_the_same_messages_as_chat_makes_of_them() -> None:
    calls = [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}]
    told = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "r"},
    ]
    chat = chat_request(json.dumps({"model": "echo", "messages": told}).encode(), MODEL)
    items = [spoken("developer", "s"), spoken("user", "x"), thought("hm"), called(arguments='{"a": 1}'), returned("r")]
    assert messages(*items) == chat.conversation.messages


def test_separate_messages_of_an_assistant_stay_apart_and_text_after_a_call_joins_its_turn() -> None:
    made = messages(spoken("user", "x"), spoken("assistant", "a"), spoken("assistant", "b"))
    assert made[1:] == [spoken("assistant", "a"), spoken("assistant", "b")]
    made = messages(spoken("user", "x"), spoken("assistant", "a"), called(), spoken("assistant", "b"))
    assert (len(made), made[1]["content"], len(made[1]["tool_calls"])) == (2, "ab", 1)
    made = messages(spoken("user", "x"), called(), thought("hm"), called())
    assert [message.get("reasoning_content") for message in made] == [None, None, "hm"]


def test_reasoning_is_its_text_or_its_summary_and_never_what_is_encrypted() -> None:
    summed = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "in short"}], "content": None}
    hidden = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAAA"}
    assert messages(spoken("user", "x"), summed, spoken("assistant", "y"))[1]["reasoning_content"] == "in short"
    assert messages(spoken("user", "x"), hidden, spoken("assistant", "y"))[1] == spoken("assistant", "y")
    assert messages(spoken("user", "x"), thought("cut off"))[1] == {
        "role": "assistant", "content": "", "reasoning_content": "cut off",
    }  # fmt: skip


def test_malformed_arguments_are_repaired_and_lost_ids_are_found() -> None:
    request = parse(input=[spoken("user", "x"), called("f", None, '{"a": [1, 2'), returned("r", None)])
    made = request.chat.conversation.messages
    assert made[1]["tool_calls"][0]["function"]["arguments"] == {"a": [1, 2]}
    assert made[1]["tool_calls"][0]["id"] == made[2]["tool_call_id"] == "functions.f:0"
    assert request.chat.delivery.repaired == ("input[1].arguments",)


def test_items_of_tools_that_this_server_has_not_are_left_out_and_named() -> None:
    for kind in sorted(SKIPPED_ITEMS):
        request = parse(input=[spoken("user", "x"), {"type": kind, "id": "i", "action": {"a": 1}}])
        assert request.chat.conversation.messages == [spoken("user", "x")]
        assert request.chat.delivery.unknown == (f"input[] of type {kind}",)


def test_only_function_tools_are_offered_and_the_others_are_named() -> None:
    request = parse(tools=codex.TOOLS)
    assert [tool["function"]["name"] for tool in request.chat.conversation.tool_use.tools] == ["shell"]
    named = request.chat.delivery.unknown
    assert named == tuple(f"tools[] of type {kind}" for kind in ("namespace", "web_search", "custom"))


def test_strict_tools_and_forced_choices_are_those_of_chat_and_are_told() -> None:
    nested = [{"type": "function", "function": {key: codex.FUNCTION[key] for key in ("name", "parameters")}}]
    for strict, choice, chats in (
        (False, "required", "required"),
        (True, {"type": "function", "name": "shell"}, {"type": "function", "function": {"name": "shell"}}),
    ):
        request = parse(tools=[{**codex.FUNCTION, "strict": strict}], tool_choice=choice)
        nested[0]["function"]["strict"] = strict
        told = {"model": "echo", "messages": [spoken("user", "x")], "tools": nested, "tool_choice": chats}
        use = chat_request(json.dumps(told).encode(), MODEL).conversation.tool_use
        here = request.chat.conversation.tool_use
        assert (here.schemas, here.strict, here.demanded, here.named) == (use.schemas, use.strict, True, use.named)
        assert json.loads(msgspec.json.encode(request.told["tool_choice"])) == choice
        assert [tool["strict"] for tool in request.told["tools"]] == [strict]


def test_allowed_tools_limit_the_calls_and_not_what_is_shown() -> None:
    tools = [codex.FUNCTION, {**codex.FUNCTION, "name": "other"}]
    names = [{"type": "function", "name": "other"}, {"type": "web_search"}]
    request = parse(tools=tools, tool_choice={"type": "allowed_tools", "mode": "required", "tools": names})
    use = request.chat.conversation.tool_use
    assert [tool["function"]["name"] for tool in use.tools] == ["shell", "other"]
    assert list(use.schemas) == ["other"] and use.demanded and use.limited and use.named is None
    assert "tool_choice of type web_search" in request.chat.delivery.unknown
    none = parse(tools=tools, tool_choice={"type": "allowed_tools", "mode": "auto", "tools": names[1:]})
    assert none.chat.conversation.tool_use.schemas is None


def test_sampling_fields_and_their_defaults_are_those_of_chat() -> None:
    assert parse().chat.params.temperature == 0.6
    params = parse(max_output_tokens=9, temperature=0.1, top_k=4, stop=["a"], seed=3, logit_bias={"3": 1}).chat.params
    assert (params.max_tokens, params.temperature, params.top_k, params.stop, params.seed) == (9, 0.1, 4, ("a",), 3)
    how = parse(tps_floor=200, cache_salt="s", priority=2, prompt_cache_key="k").chat.delivery
    assert (how.tps_floor, how.cache_salt, how.priority, how.prompt_cache_key) == (200.0, "s", 2, "k")
    assert parse(chat_template_kwargs={"a": 1}).chat.conversation.template_kwargs == {"a": 1}


def test_a_format_of_the_text_is_the_grammar_that_chat_makes_of_its_response_format() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    flat = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    nested = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    any_object = {"type": "json_object"}
    for text, response in ((flat, nested), (any_object, any_object), ({"type": "text"}, None)):
        told = {"model": "echo", "messages": [spoken("user", "x")], "response_format": response}
        chat = chat_request(json.dumps(told).encode(), MODEL).params.grammar
        request = parse(text={"format": text, "verbosity": "low"})
        here = request.chat.params.grammar
        assert (here and (here.kind, here.text)) == (chat and (chat.kind, chat.text))
        assert json.loads(msgspec.json.encode(request.told["text"])) == {"format": text, "verbosity": "low"}
    assert here is None


def test_hints_are_told_apart_from_unknown_fields() -> None:
    typed = {"metadata": {}, "reasoning": {}, "max_tool_calls": 3, "include": ["reasoning.encrypted_content"]}
    for field in sorted(HINTS):
        how = parse(**{field: typed.get(field, "x"), "flux": 1}).chat.delivery
        assert (how.hints, how.unknown) == ((field,), ("flux",)), field
    assert parse(text={"flux": 1}).chat.delivery.unknown == ("text.flux",)


def test_null_is_absent_for_every_field() -> None:
    bare = parse()
    assert parse(**dict.fromkeys(OWN - {"input"})).chat.conversation == bare.chat.conversation


def test_a_turn_may_have_many_calls_but_not_any_number() -> None:
    many = [called(id=str(number)) for number in range(MAX_CALLS)]
    assert len(messages(spoken("user", "x"), *many)[1]["tool_calls"]) == MAX_CALLS
    with pytest.raises(InvalidRequest) as refused:
        messages(spoken("user", "x"), *many, called())
    assert refused.value.param == f"input[{MAX_CALLS + 1}]"


THOUGHT = "<think>\nThe user wants a list.\n</think>\n\nI look."
CALLED = '\n<tool_call>\n{"name": "shell", "arguments": {"command": ["ls", "-a"]}}\n</tool_call>'


def turn(served: Served, items: list[dict[str, Any]]) -> tuple[list[int], list[dict[str, Any]]]:
    """The prompt of one turn of Codex, and the items of its response."""
    reply = served.post(ROUTE, codex.request(items, model="echo", max_output_tokens=500))
    last = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: ")][-1]
    assert last["type"] == "response.completed", reply.text
    return served.engine.submitted[-1]["ids"], last["response"]["output"]


def test_the_next_turn_of_codex_begins_with_the_prompt_and_the_tokens_of_the_last_one() -> None:
    with serving(template=qwen3(), max_model_len=8192) as served:
        items = list(codex.OPENING)
        for result in (".\n..\nREADME.md\n", "", "x = 1\n"):
            with saying(served, THOUGHT + CALLED):
                before, output = turn(served, items)
            assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
            items += codex.answered(output, result)
            with saying(served, "Done."):
                after, _ = turn(served, items)
            written = [*before, *(THOUGHT + CALLED).encode()]
            assert after[: len(written)] == written


def test_codexs_request_is_taken_without_complaint_but_for_the_tools_it_cannot_have(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(template=qwen3(), max_model_len=8192) as served, caplog.at_level(logging.INFO):
        with saying(served, THOUGHT + CALLED):
            _, output = turn(served, list(codex.OPENING))
        with saying(served, "Done."):
            turn(served, [*codex.OPENING, *codex.answered(output, "README.md")])
    lines = [record.getMessage() for record in caplog.records]
    assert not [line for line in lines if line.startswith("warnings")]
    told = [line for line in lines if line.startswith("tools[]")]
    assert len(told) == len(set(told)) and any("namespace" in line for line in told)
    assert any("web_search" in line for line in told)


def test_a_conversation_over_the_context_gets_the_code_that_codex_compacts_on() -> None:
    with serving(template=qwen3(), max_model_len=512) as served:
        for stream in (False, True):
            reply = served.post(ROUTE, {"model": "echo", "input": "x" * 600, "stream": stream})
            assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
            assert (reply.error["type"], reply.error["param"]) == ("invalid_request_error", "input")
            assert events(reply.text) == [reply.text]
