"""A call comes back into the prompt as the model wrote it, however the client wrote its arguments."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.text.parsers.reading import parser
from tests.text.parsers.test_round_trip import TEMPLATES, turn
from tests.text.templates import LLAMA3, MISTRAL, TOKENS, call, joined
from tests.text.test_prompt_memory import shared, spelt
from tokenspeed.text.parsers.events import CallArguments, CallBegun
from tokenspeed.text.parsers.repair import arguments_object
from tokenspeed.text.prompt_memory import PromptMemory
from tokenspeed.text.provenance import converted
from tokenspeed.text.spans import Span
from tokenspeed.text.template import ChatTemplate
from tokenspeed.text.tokenizer import Tokenizer
from tokenspeed.text.written import WrittenObject, json_text, written_object
from tokenspeed.text.written_calls import CallNotes, WrittenCalls

WRITTEN = '{"city":"Par\\u00eds","days":3, "options":{"a":[1,2]}}'
PLAIN = json.dumps(json.loads(WRITTEN), ensure_ascii=False)
FORMATS = {**TEMPLATES, "llama3_json": LLAMA3}
BEGUN = {**dict.fromkeys(TEMPLATES, "<|im_start|>assistant\n"), "llama3_json": "<|im_start|>assistant\n\n"}


def client_message(events: list[Any]) -> dict[str, Any]:
    """What a client makes of an answer that has one call, its arguments read and written anew."""
    name, id = next((event.name, event.id) for event in events if isinstance(event, CallBegun))
    text = "".join(event.fragment for event in events if isinstance(event, CallArguments))
    arguments, repaired = arguments_object(json.dumps(json.loads(text), indent=1))
    assert not repaired
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": id, "type": "function", "function": function}]}


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_call_in_any_format_comes_back_as_the_tokens_that_were_generated(name: str, toy: Tokenizer) -> None:
    template = ChatTemplate(FORMATS[name], special_tokens=TOKENS, name=name)
    written = written_object(WRITTEN)
    assert written is not None
    text = turn_text(template, BEGUN[name], written)
    assert text != turn_text(template, BEGUN[name], json.loads(WRITTEN))

    calls, memory = WrittenCalls(), PromptMemory(toy)
    chat = [{"role": "user", "content": "x"}]
    prompt = memory.encode([*template.render(chat, add_generation_prompt=False), Span(BEGUN[name], False)])
    generated = tokens(toy, text)
    memory.remember(prompt, generated)
    reader = parser(name)
    reader.listen(CallNotes(calls, "tenant"))  # type: ignore[attr-defined]
    events = [*reader.feed(text), *reader.finish()]

    chat += [client_message(events), {"role": "tool", "content": "y", "tool_call_id": "z"}]
    spans = template.render(calls.restored(chat, "tenant"))
    following = memory.encode(spans).ids.tolist()
    assert text in joined(spans)
    assert toy.decode(following, skip_special_tokens=False) == joined(spans)
    before = [*prompt.ids.tolist(), *generated]
    assert shared(before, following) >= len(before) - 1
    assert PLAIN not in joined(spans) or name == "qwen3_coder"
    assert joined(template.render(calls.restored(chat, "other"))) == joined(template.render(chat))


def tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text byte by byte, but with the control token that begins a call."""
    parts = text.split("<tool_call>")
    begun = tokenizer.control["<tool_call>"]
    return [id for part in parts for id in (begun, *spelt(tokenizer, part))][1:]


def turn_text(template: ChatTemplate, begun: str, arguments: dict[str, Any]) -> str:
    """What the template makes of one call in the middle of a conversation."""
    message = {"role": "assistant", "content": None, "tool_calls": [call("get_weather", arguments)]}
    message["tool_calls"][0]["id"] = "functions.get_weather:0"  # type: ignore[index]
    chat = [{"role": "user", "content": "x"}, message, {"role": "tool", "content": "y", "tool_call_id": "z"}]
    text = joined(template.render(chat, add_generation_prompt=False))
    return text.split(begun, 1)[1].rsplit("<|im_end|>", 2)[0]


def test_the_round_trip_of_the_formats_is_that_of_this_test() -> None:
    template = ChatTemplate(TEMPLATES["hermes"], special_tokens=TOKENS, name="hermes")
    assert turn_text(template, BEGUN["hermes"], {}) == turn(template, "", "", [("get_weather", {})])


@pytest.mark.parametrize(
    "text", ["", "[1]", "{a: 1}", '{"a": 1}', '{"a": 1', "null", '{"a": "\\ud800" }', "{}", '{"a":' + "[" * 9999]
)
def test_what_a_template_would_write_alike_or_no_client_can_keep_is_not_noted(text: str) -> None:
    calls = WrittenCalls()
    calls.note("tenant", "id", "f", text)
    chat = [{"role": "assistant", "tool_calls": [call("f", {"a": 1})]}]
    assert calls.restored(chat, "tenant") is chat


def test_the_first_of_two_ways_to_write_a_call_stays() -> None:
    calls = WrittenCalls()
    for text in ('{"a":1}', '{"a" : 1}'):
        calls.note("tenant", "abcdefghi", "f", text)
    made = calls.restored([{"role": "assistant", "tool_calls": [call("f", {"a": 1})]}], "tenant")
    assert made[0]["tool_calls"][0]["function"]["arguments"].written_as == '{"a":1}'


def test_another_value_is_written_as_it_is() -> None:
    calls = WrittenCalls()
    calls.note("tenant", "abcdefghi", "f", '{"a":1}')
    for arguments in ({"a": 2}, {"a": 1.0}, {"a": True}, {"a": 1, "b": 2}):
        chat = [{"role": "assistant", "tool_calls": [call("f", arguments)]}]
        assert calls.restored(chat, "tenant") == chat
        assert json_text(calls.restored(chat, "tenant")) == json.dumps(chat)


def test_a_template_that_shows_a_whole_function_shows_its_arguments_as_written() -> None:
    template = ChatTemplate(MISTRAL, special_tokens=TOKENS, name="mistral")
    called = {"role": "assistant", "tool_calls": [call("f", written_object('{"a":1}'))]}
    chat = [{"role": "user", "content": "x"}, called]
    assert '{"name": "f", "arguments": {"a":1}' in joined(template.render(chat))


def test_json_with_options_or_around_other_keys_is_what_it_always_was() -> None:
    source = "{{ m | tojson(indent=1) }}{{ m | tojson }}{{ {1: m} | tojson }}"
    template = ChatTemplate("{% set m = messages[0].a %}" + source, name="x")
    value = {"b": [1, {"c": "é"}]}
    plain = joined(template.render([{"role": "user", "a": value}]))
    parts = [(value, 1), (value, None), ({1: value}, None)]
    assert plain == "".join([json.dumps(part, ensure_ascii=False, indent=indent) for part, indent in parts])
    written = written_object('{"b":[1,{"c":"\\u00e9"}]}')
    assert '{"b":[1,{"c":"\\u00e9"}]}' in joined(template.render([{"role": "user", "a": written}]))


def test_what_was_written_stays_with_an_object_that_a_template_gets() -> None:
    made = converted(written_object('{"a":[1]}'))
    assert isinstance(made, WrittenObject) and made == {"a": [1]} and made.written_as == '{"a":[1]}'
    assert made["a"].written_as == "[1]"


def test_texts_are_forgotten_when_there_are_too_many() -> None:
    calls = WrittenCalls(max_bytes=2000)
    for number in range(50):
        calls.note("tenant", f"id{number}", "f", '{"a":1}')
    chat = [{"role": "assistant", "tool_calls": [{**call("f", {"a": 1}), "id": "id0"}]}]
    assert calls.restored(chat, "tenant") == chat
    assert json_text(calls.restored(chat, "tenant")) == json.dumps(chat)
