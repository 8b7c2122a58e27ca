"""The grammars of calls: whatever they allow, written at random, the parser of the format reads back as such calls."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.text.grammars.alphabet import compiled, matches, random_text
from tests.text.parsers.cases import ALL, TOOLS
from tests.text.parsers.reading import Seen, read
from tokenspeed.request import Grammar
from tokenspeed.text.grammars.formats import as_format
from tokenspeed.text.grammars.judge import with_schemas
from tokenspeed.text.parsers.answer_grammar import Calls, answer_grammar
from tokenspeed.text.parsers.call_grammars import CALL_FORMATS, Callable
from tokenspeed.text.parsers.choose import REASONING_PARSERS, TOOL_PARSERS, AnswerFormat
from tokenspeed.text.parsers.llama3_json import PYTHON_TAG

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "enum": ["Paris", "Bonn"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "near": {"type": ["integer", "null"]},
            "options": {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]},
        },
        "required": ["city", "options"],
    },
    "now": {"type": "object", "properties": {}},
    "sum": {
        "type": "object",
        "properties": {"of": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "boolean"}},
    },
}
TOOL_LIST = [Callable(name, schema, strict=True) for name, schema in SCHEMAS.items()]
EACH = pytest.mark.parametrize("name", sorted(CALL_FORMATS))


def said(name: str, text: str) -> Seen:
    """What the parser reads in a text, however it is cut."""
    make = AnswerFormat(name, None).parser(SCHEMAS, "")
    assert make is not None
    seen = read(make(), [text])
    assert read(make(), text) == seen
    return seen


def check(seen: Seen) -> None:
    """Every call is of a tool, and its arguments are as the tool's schema says."""
    for tool, arguments in seen.calls:
        value = json.loads(arguments)
        if tool == "get_weather":
            assert value["city"] in ("Paris", "Bonn") and value["options"]["unit"] in ("C", "F")
            assert 1 <= value.get("days", 1) <= 9 and set(value) <= set(SCHEMAS[tool]["properties"])
        elif tool == "now":
            assert value == {}
        else:
            assert tool == "sum" and all(isinstance(item, int) for item in value.get("of", []))


def texts(format: dict[str, Any], begin: str = "", count: int = 15) -> list[str]:
    grammar = compiled(format)
    found = [text for seed in range(count) if (text := random_text(grammar, seed, begin)) is not None]
    assert len(found) > count // 2
    return found


@EACH
def test_demanded_calls_are_calls_and_nothing_else(name: str) -> None:
    for text in texts(CALL_FORMATS[name].calls(TOOL_LIST)):
        seen = said(name, text)
        assert seen.calls and not seen.content.strip(), text
        check(seen)


@EACH
def test_one_demanded_call_is_one_call(name: str) -> None:
    for text in texts(CALL_FORMATS[name].calls(TOOL_LIST, most=1)):
        assert len(said(name, text).calls) == 1, text


@EACH
def test_in_free_text_whatever_is_a_call_follows_its_schema(name: str) -> None:
    written = CALL_FORMATS[name]
    for trigger in written.triggers(TOOL_LIST):
        for text in texts(written.free(TOOL_LIST, parallel=True), f"Let me see.\n{trigger}", count=8):
            seen = said(name, text)
            assert seen.calls
            check(seen)


@EACH
def test_without_parallel_calls_nothing_follows_the_first_one(name: str) -> None:
    written = CALL_FORMATS[name]
    for text in texts(written.free(TOOL_LIST, parallel=False), written.triggers(TOOL_LIST)[0], count=8):
        assert len(said(name, text).calls) == 1, text


def test_there_is_a_grammar_for_every_parser() -> None:
    assert set(CALL_FORMATS) == set(TOOL_PARSERS)


@pytest.mark.parametrize("case", [case for case in ALL if case.name == "one call"], ids=str)
def test_what_models_write_in_the_plainest_way_is_allowed(case: Any) -> None:
    tools = [Callable(name, schema, strict=True) for name, schema in {**TOOLS, "f": TOOLS["get_weather"]}.items()]
    assert matches(compiled(CALL_FORMATS[case.parser].calls(tools)), case.text.strip()), case.text


@EACH
def test_a_demanded_call_may_stand_on_a_line_of_its_own(name: str) -> None:
    written = CALL_FORMATS[name]
    for text in texts(written.calls(TOOL_LIST, most=1), count=5):
        plain = text.lstrip("\n").removeprefix(PYTHON_TAG)
        for lead in written.leads:
            assert matches(compiled(written.calls(TOOL_LIST, most=1)), lead + plain)
            seen = said(name, lead + plain)
            assert len(seen.calls) == 1 and not seen.content.strip()


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
ASKED = Grammar("json_schema", json.dumps(OBJECT), "response_format")


def allowed(grammar: Grammar | None, text: str) -> bool:
    assert grammar is not None
    return matches(compiled(with_schemas(as_format(grammar))), text)


@pytest.mark.parametrize("reasoning", sorted(REASONING_PARSERS))
def test_a_grammar_binds_after_the_thinking_and_at_once_where_the_prompt_has_closed_it(reasoning: str) -> None:
    answers, (begin, end) = AnswerFormat(None, reasoning), REASONING_PARSERS[reasoning].marks
    opened = answer_grammar(answers, ASKED, None, f"{begin}\n")
    assert allowed(opened, f'so {{"b" is\n{end}\n\n{{"a": 1}}') and not allowed(opened, '{"a": 1}')
    closed = answer_grammar(answers, ASKED, None, f"{begin}\n\n{end}\n\n")
    assert allowed(closed, '{"a": 1}') and not allowed(closed, f'well\n{end}\n{{"a": 1}}')
    unsaid = answer_grammar(answers, ASKED, None, "<|assistant|>")
    assert allowed(unsaid, '{"a": 1}') is not REASONING_PARSERS[reasoning].assumed
    assert allowed(unsaid, f'{begin}\nhm\n{end}\n{{"a": 1}}')


def test_beside_a_response_format_an_answer_is_calls_or_the_format() -> None:
    calls = Calls(SCHEMAS, frozenset(), demanded=False, named=None, parallel=True)
    grammar = answer_grammar(AnswerFormat("hermes", None), ASKED, calls, "")
    assert allowed(grammar, '{"a": 1}')
    assert allowed(grammar, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not allowed(grammar, "text")


def test_a_named_function_is_called_once_and_no_other() -> None:
    calls = Calls(SCHEMAS, frozenset(), demanded=True, named="now", parallel=True)
    grammar = answer_grammar(AnswerFormat("hermes", None), None, calls, "")
    call = '<tool_call>\n{"name": "%s", "arguments": {}}\n</tool_call>'
    assert allowed(grammar, call % "now")
    assert not allowed(grammar, call % "sum") and not allowed(grammar, f"{call % 'now'}\n{call % 'now'}")


def test_tools_without_strict_leave_the_text_free() -> None:
    calls = Calls(SCHEMAS, frozenset(), demanded=False, named=None, parallel=True)
    assert answer_grammar(AnswerFormat("hermes", None), None, calls, "") is None
