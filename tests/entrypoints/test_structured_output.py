"""Which grammar a request asks of the engine: the fields of every route, thinking, and tools that must be called."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.entrypoints.corpus import CHAT, COMPLETION
from tests.entrypoints.served import Served, serving
from tests.entrypoints.test_tool_calls import qwen3
from tests.text.grammars.alphabet import compiled, matches
from tokenspeed.request import Grammar
from tokenspeed.text.grammars.formats import as_format
from tokenspeed.text.grammars.judge import with_schemas

MESSAGES = [{"role": "user", "content": "x"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


def schema_format(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, **more}}


def asked(served: Served, route: str, **fields: Any) -> Grammar | None:
    """The grammar of the request that reaches the engine."""
    prompt = {"messages": MESSAGES} if route == CHAT else {"prompt": "x"}
    reply = served.post(route, {"model": "echo", "max_tokens": 4, **prompt, **fields})
    assert reply.status == 200, reply.text
    grammar = served.engine.submitted[-1]["params"].grammar
    assert grammar is None or isinstance(grammar, Grammar)
    return grammar


def allows(grammar: Grammar | None, text: str) -> bool:
    assert grammar is not None
    return matches(compiled(with_schemas(as_format(grammar))), text)


@pytest.mark.parametrize("route", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    ("fields", "kind", "text", "field"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}', "response_format"),
        ({"structured_outputs": {"regex": "a+"}}, "regex", "a+", "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "ebnf", "root ::= x", "structured_outputs.grammar"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", '["a","b"]', "structured_outputs.choice"),
        ({"guided_regex": "a+"}, "regex", "a+", "guided_regex"),
        ({"guided_grammar": "root ::= x"}, "ebnf", "root ::= x", "guided_grammar"),
        ({"guided_choice": ["a"]}, "choice", '["a"]', "guided_choice"),
        ({"guided_json": {}}, "json_schema", "{}", "guided_json"),
        ({"regex": "a"}, "regex", "a", "regex"),
        ({"ebnf": "root ::= x"}, "ebnf", "root ::= x", "ebnf"),
        ({"json_schema": '{"a": 1}'}, "json_schema", '{"a": 1}', "json_schema"),
    ],
)
def test_every_spelling_asks_for_its_grammar(
    served: Served, route: str, fields: dict[str, Any], kind: str, text: str, field: str
) -> None:
    grammar = asked(served, route, **fields)
    assert grammar is not None and (grammar.kind, grammar.field) == (kind, field)
    assert grammar.text == text or json.loads(grammar.text) == json.loads(text)


@pytest.mark.parametrize("route", [CHAT, COMPLETION])
def test_a_schema_is_strict_unless_the_request_says_otherwise(served: Served, route: str) -> None:
    for more, strict in (({}, True), ({"strict": True}, True), ({"strict": False}, False)):
        grammar = asked(served, route, response_format=schema_format(**more))
        assert grammar is not None and json.loads(grammar.text) == SCHEMA
        assert (grammar.strict, grammar.field) == (strict, "response_format.json_schema.schema")
    assert asked(served, route, response_format={"type": "text"}) is None


def test_a_thinking_model_thinks_before_its_grammar_binds() -> None:
    with serving(template=qwen3(), reasoning_parser="qwen3", max_model_len=8192) as thinker:
        grammar = asked(thinker, CHAT, response_format=schema_format())
        assert grammar is not None and grammar.thinking == "allowed"
        assert allows(grammar, '<think>\nhm\n</think>\n\n{"a": 1}') and allows(grammar, '{"a": 1}')


def test_a_demanded_call_is_a_grammar_in_the_models_own_format() -> None:
    call = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
    with serving(template=qwen3(), tool_call_parser="hermes", reasoning_parser="none", max_model_len=8192) as caller:
        required = asked(caller, CHAT, tools=[TOOL, NOW], tool_choice="required")
        assert allows(required, call % ("f", '{"a": 1}') + "\n" + call % ("now", "{}"))
        assert not allows(required, "text") and not allows(required, call % ("f", "{}"))
        one = asked(caller, CHAT, tools=[TOOL, NOW], tool_choice="required", parallel_tool_calls=False)
        assert not allows(one, call % ("now", "{}") + "\n" + call % ("now", "{}"))
        named = asked(
            caller, CHAT, tools=[TOOL, NOW], tool_choice={"type": "function", "function": {"name": "now"}}
        )
        assert allows(named, call % ("now", "{}")) and not allows(named, call % ("f", '{"a": 1}'))


def test_strict_tools_leave_text_free_and_bind_their_arguments() -> None:
    call = 'Well.\n<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    with serving(template=qwen3(), tool_call_parser="hermes", reasoning_parser="none", max_model_len=8192) as caller:
        grammar = asked(caller, CHAT, tools=[strict])
        assert allows(grammar, "only text") and allows(grammar, call % '{"a": 1}')
        assert not allows(grammar, call % '{"a": "x"}')
        assert asked(caller, CHAT, tools=[strict], tool_choice="none") is None
        assert asked(caller, CHAT, tools=[TOOL]) is None


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_of_allowed_tools_alone_calls_may_come_though_all_are_shown() -> None:
    call = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
    with serving(template=qwen3(), tool_call_parser="hermes", reasoning_parser="none", max_model_len=8192) as caller:
        auto = asked(caller, CHAT, tools=[TOOL, NOW], tool_choice=allowed("auto", "now"))
        shown = caller.engine.submitted[-1]["ids"]
        assert allows(auto, "only text") and allows(auto, "Well.\n" + call % ("now", "{}"))
        assert not allows(auto, call % ("f", '{"a": 1}'))
        required = asked(caller, CHAT, tools=[TOOL, NOW], tool_choice=allowed("required", "now"))
        assert allows(required, call % ("now", "{}") + "\n" + call % ("now", "{}"))
        assert not allows(required, "only text") and not allows(required, call % ("f", '{"a": 1}'))
        assert asked(caller, CHAT, tools=[TOOL, NOW]) is None
        assert caller.engine.submitted[-1]["ids"] == shown
