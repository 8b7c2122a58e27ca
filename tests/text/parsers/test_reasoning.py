"""Thinking before the answer, opened by the prompt or by the model."""

from __future__ import annotations

import pytest

from tests.text.parsers.reading import Seen, parser, read
from tokenspeed.text.parsers.reasoning import opened_by

CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
KIMI_CALL = "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
NOW = [("now", "{}")]

CASES = [
    ("the model opens it", "qwen3", "", "<think>\nhm\n</think>\n\nYes", Seen("Yes", "hm")),
    ("the prompt has opened it", "qwen3", "<think>\n", "hm\n</think>\n\nYes", Seen("Yes", "hm")),
    ("both have", "qwen3", "<think>\n", "<think>\nhm</think>Yes", Seen("Yes", "hm")),
    ("the prompt has closed it", "qwen3", "<think>\n\n</think>\n\n", "Yes", Seen("Yes")),
    ("nobody opens it", "qwen3", "", "  Yes </think>", Seen("  Yes </think>")),
    ("closed at once", "qwen3", "", "</think>\n\nYes", Seen("Yes")),
    ("never closed", "qwen3", "<think>\n", "hm\n", Seen("", "hm\n")),
    ("nothing", "qwen3", "", "", Seen()),
    ("empty thinking", "qwen3", "", "<think>\n\n</think>\n\nYes", Seen("Yes")),
    ("a call behind it", "qwen3", "", f"<think>hm</think>\n\n{CALL}", Seen("", "hm", NOW)),
    ("a call inside of it", "qwen3", "<think>\n", f"hm\n{CALL}", Seen("", "hm", NOW)),
    (
        "the tag of a call in the thinking",
        "qwen3",
        "<think>\n",
        f"I use\n<tool_call> now.</think>{CALL}",
        Seen("", "I use\n<tool_call> now.", NOW),
    ),
    ("GLM calls inside of it", "glm45", "", "<think>hm<tool_call>now</tool_call>", Seen("", "hm", NOW)),
    ("Mistral's marks", "mistral", "", "[THINK]hm </think>[/THINK]Yes", Seen("Yes", "hm </think>")),
    ("Mistral forgets to close", "mistral", "", "[THINK]hm[TOOL_CALLS]now[ARGS]{}", Seen("", "hm", NOW)),
    ("R1 is inside unless told", "deepseek_r1", "", "hm</think>Yes", Seen("Yes", "hm")),
    ("R1 told", "deepseek_r1", "</think>", "Yes", Seen("Yes")),
    ("Kimi forgets to close", "kimi_k2", "", f"<think>hm{KIMI_CALL}", Seen("", "hm", NOW)),
    (
        "Kimi in a section",
        "kimi_k2",
        "<think>",
        f"hm\n<|tool_calls_section_begin|>{KIMI_CALL}<|tool_calls_section_end|>",
        Seen("", "hm", NOW),
    ),
]


@pytest.mark.parametrize(("name", "reasoning", "prompt_end", "text", "expected"), CASES)
def test_thinking_is_told_from_the_answer_however_the_text_is_cut(
    name: str, reasoning: str, prompt_end: str, text: str, expected: Seen
) -> None:
    tools = reasoning if reasoning in ("glm45", "kimi_k2", "mistral") else "hermes"
    assert read(parser(tools, reasoning, prompt_end), text) == expected
    for at in range(len(text) + 1):
        assert read(parser(tools, reasoning, prompt_end), (text[:at], text[at:])) == expected, text[:at]


def test_without_tools_a_tag_of_theirs_ends_no_thinking() -> None:
    seen = read(parser(None, "qwen3", "<think>\n"), f"{CALL}\n</think>\n\nYes")
    assert seen == Seen("Yes", CALL)


@pytest.mark.parametrize(
    ("end", "inside"),
    [("<｜A｜><think>\n", True), ("<think>\n\n</think>\n\n", False), ("</think>", False), ("<|turn|>", None)],
)
def test_the_end_of_the_prompt_says_whether_thinking_is_open(end: str, inside: bool | None) -> None:
    assert opened_by(end) is inside
