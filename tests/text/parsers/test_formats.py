"""Every format: what the table says, however the text is cut, and nothing held back that need not be."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.text.parsers.cases import ALL, Case
from tests.text.parsers.reading import Bypassing, Seen, parser, read
from tokenspeed.text.parsers.choose import REASONING_PARSERS, TOOL_PARSERS
from tokenspeed.text.parsers.events import CallArguments, CallBegun, Content

EACH = pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.parser}: {case.name}")


@EACH
def test_a_text_is_what_the_table_says(case: Case) -> None:
    assert read(parser(case.parser), [case.text]) == Seen(case.content, "", case.calls)


@EACH
def test_the_sum_is_the_same_for_every_cut_in_two_and_character_by_character(case: Case) -> None:
    expected = Seen(case.content, "", case.calls)
    assert read(parser(case.parser), case.text) == expected
    for at in range(1, len(case.text)):
        assert read(parser(case.parser), (case.text[:at], case.text[at:])) == expected, case.text[:at]


@EACH
def test_what_may_pass_without_being_read_is_what_reading_would_have_told(case: Case) -> None:
    expected = Seen(case.content, "", case.calls)
    assert read(Bypassing(parser(case.parser)), case.text) == expected
    for at in range(1, len(case.text)):
        pieces = (case.text[:at], case.text[at : at + 5], case.text[at + 5 :])
        assert read(Bypassing(parser(case.parser)), pieces) == expected, case.text[:at]


@EACH
def test_arguments_are_json_unless_the_model_wrote_none(case: Case) -> None:
    if not any(word in case.name for word in ("cut off", "no JSON", "no keyword")):
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in case.calls)


def test_every_format_is_in_the_table() -> None:
    assert {case.parser for case in ALL} == set(TOOL_PARSERS)


UNICODE = st.characters(exclude_categories=["Cs"])
LEAVES = st.none() | st.booleans() | st.integers() | st.text(UNICODE)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True)

FRAGMENTS = [
    *sorted({case.text for case in ALL if len(case.text) < 200}),
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=now>", "<parameter=a>", "</parameter>", "\n", " ",
    '{"name": "now"', '"arguments": {', "}", "]", "[now(", ")", "\\", '"', "'", "\\u00", "{", "``", "é", "👋",
]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    tools=st.sampled_from(sorted(TOOL_PARSERS)),
    reasoning=st.sampled_from([None, *sorted(REASONING_PARSERS)]),
    parts=st.lists(st.sampled_from(FRAGMENTS).flatmap(lambda text: st.builds(lambda n: text[:n], st.integers(0, 200)))),
    cuts=st.lists(st.integers(0, 400)),
)
def test_whatever_a_model_writes_is_read_alike_however_it_is_cut(
    tools: str, reasoning: str | None, parts: list[str], cuts: list[int]
) -> None:
    text = "".join(parts)
    borders = [0, *sorted({cut for cut in cuts if cut < len(text)}), len(text)]
    pieces = [text[start:end] for start, end in pairwise(borders)]
    whole = read(parser(tools, reasoning), [text])
    assert read(parser(tools, reasoning), pieces) == whole
    assert read(parser(tools, reasoning), text) == whole
    assert read(Bypassing(parser(tools, reasoning)), pieces) == whole
    assert read(Bypassing(parser(tools, reasoning)), text) == whole


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(UNICODE, max_size=5),
        st.recursive(
            LEAVES | NUMBERS,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(UNICODE), inner, max_size=3),
            max_leaves=10,
        ),
    ),
    st.booleans(),
    st.sampled_from([None, 1, "\t"]),
)
def test_json_arguments_come_out_as_they_went_in(
    arguments: dict[str, object], ascii: bool, indent: int | str | None
) -> None:
    text = json.dumps(arguments, ensure_ascii=ascii, indent=indent)
    for name, before, after in (
        ("hermes", '<tool_call>{"name": "now", "arguments": ', "}</tool_call>"),
        ("deepseek_v31", "<｜tool▁call▁begin｜>now<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        ("kimi_k2", "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>", "<|tool_call_end|>"),
        ("llama3_json", '{"name": "now", "parameters": ', "}"),
    ):
        assert read(parser(name), before + text + after) == Seen("", "", [("now", text)])


@settings(max_examples=100, deadline=None)
@given(st.text(UNICODE), st.text(UNICODE))
def test_any_text_arrives_as_an_xml_parameter(path: str, content: str) -> None:
    text = (
        f"<tool_call>\n<function=write_file>\n<parameter=path>\n{path}\n</parameter>\n<parameter=content>\n{content}\n"
        "</parameter>\n</function>\n</tool_call>"
    )
    (call,) = read(parser("qwen3_coder"), text).calls
    assert (call[0], json.loads(call[1])) == ("write_file", {"path": path, "content": content})


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, LEAVES | NUMBERS | st.lists(LEAVES) | st.dictionaries(st.text(UNICODE), LEAVES)))
def test_python_arguments_come_out_as_json(arguments: dict[str, object]) -> None:
    text = f"[now({', '.join(f'{name}={value!r}' for name, value in arguments.items())})]"
    (call,) = read(parser("pythonic"), text).calls
    assert (call[0], json.loads(call[1])) == ("now", arguments)


def fragments(name: str, text: str) -> list[str]:
    """What each character of the text makes known of a call's arguments."""
    reader = parser(name)
    return [
        "".join(event.fragment for event in reader.feed(character) if isinstance(event, CallArguments))
        for character in text
    ]


def test_arguments_come_as_they_are_generated() -> None:
    call = '<tool_call>{"name": "now", "arguments": {"a": "hello world"'
    assert fragments("hermes", call)[-11:] == [*"ello world", '"']
    call = "<tool_call><function=write_file><parameter=path>\nhello world"
    assert fragments("qwen3_coder", call)[-11:] == list("hello world")
    assert fragments("pythonic", "[now(a='hello world")[-10:] == list("ello world")
    call = "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{'a': 'hello world"
    assert fragments("kimi_k2", call)[-10:] == list("ello world")


@pytest.mark.parametrize(
    ("name", "reasoning", "before", "text"),
    [
        ("hermes", None, "So", " hello world"),
        ("hermes", None, '<tool_call>{"name": "now", "arguments": {"a": "b', "hello 'world'"),
        ("hermes", "qwen3", "<think>hm", " hello, world"),
        ("hermes", "qwen3", "<think>hm</think>Yes", " hello, world"),
        ("qwen3_coder", None, "So", " hello world"),
        ("qwen3_coder", None, "<tool_call><function=write_file><parameter=path>\nx", ' say "hello"'),
        ("kimi_k2", None, '<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{"a": "x', "hello world"),
        ("deepseek_v31", None, '<｜tool▁call▁begin｜>now<｜tool▁sep｜>{"a": "x', "hello world"),
        ("llama3_json", None, '{"name": "now", "parameters": {"a": "x', "hello world"),
        ("pythonic", None, "So", " hello world"),
    ],
)
def test_long_texts_and_strings_are_read_only_where_they_may_end(
    name: str, reasoning: str | None, before: str, text: str
) -> None:
    reader = Bypassing(parser(name, reasoning))
    reader.reader.feed(before)
    for character in text:
        reader.feed(character)
    assert reader.count == len(text)


def test_escapes_pass_where_they_are_complete() -> None:
    reader = parser("hermes")
    reader.feed('<tool_call>{"name": "now", "arguments": {"a": "b')
    passage = reader.passage()
    assert passage is not None
    assert all(map(passage.plain.allows, ("x", r"\n", r"def f():\n\treturn \"é\"", r"\\", "'")))
    assert not any(map(passage.plain.allows, ('"', "\\", r"\\" + "\\", r"\u00e9", r"\x41", "\n", r'\\"')))


def test_the_name_is_told_before_the_arguments_are_complete() -> None:
    reader = parser("hermes")
    events = reader.feed('<tool_call>\n{"name": "now"')
    assert [type(event) for event in events] == [CallBegun]


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_no_more_is_held_back_than_may_become_a_marker(name: str) -> None:
    reader = parser(name)
    reader.feed("x")
    longest = max(len(text) for text in (*TOOL_PARSERS[name].markers, "\n<tool_call>"))
    text = "if a < b and <tool_box> or {1: 2}: <|x|> <｜y｜> [now] (z)\n\n" * 3
    shown = ""
    for size, character in enumerate(text, 1):
        shown += "".join(event.text for event in reader.feed(character) if isinstance(event, Content))
        assert size - len(shown) <= longest, shown
    assert text.startswith(shown.removeprefix("x"))


def test_ids_are_kimis_own_and_unique_elsewhere() -> None:
    def ids(name: str, text: str) -> list[str]:
        return [event.id for event in parser(name).feed(text) if isinstance(event, CallBegun)]

    call = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{{}}<|tool_call_end|>"
    assert ids("kimi_k2", call.format("functions.now:7") + call.format("now")) == ["functions.now:7", "functions.now:1"]
    first, second = ids("hermes", '<tool_call>{"name":"a"}</tool_call><tool_call>{"name":"b"}</tool_call>')
    assert first != second
    assert first.startswith("call_")


def test_a_call_of_mistrals_has_an_id_that_its_template_takes() -> None:
    def id_of(given: str) -> str:
        events = parser("mistral").feed(f"[TOOL_CALLS]now[CALL_ID]{given}[ARGS]{{}}")
        return next(event.id for event in events if isinstance(event, CallBegun))

    assert id_of("abcDEF123") == "abcDEF123"
    for odd in ("1", "call_7f3a", "abcDEF1234", "äbcDEF123"):
        assert re.fullmatch("[a-zA-Z0-9]{9}", id_of(odd)), odd


def test_only_the_first_call_counts_without_parallel_calls() -> None:
    text = '<tool_call>{"name":"a"}</tool_call> and <tool_call>{"name":"b"}</tool_call> end'
    seen = read(parser("hermes", parallel=False), [text])
    assert seen == Seen("and end", "", [("a", "{}")])


def test_a_long_answer_is_read_in_linear_time() -> None:
    """A million characters that are always held back: pieces are kept, not copied again and again."""
    reader = parser("hermes")
    events = reader.feed('<tool_call>{"arguments": {"a": "')
    for _ in range(20_000):
        events += reader.feed("x" * 50)
    assert not events
    assert [type(event) for event in reader.feed('"}, "name": "now"')] == [CallBegun, CallArguments]
