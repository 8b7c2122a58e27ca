"""What was generated is rendered again as it was generated, or the next turn misses the prefix cache from there on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.text.parsers.reading import Seen, parser, read
from tests.text.templates import QWEN3, TOKENS, joined
from tokenspeed.text.template import ChatTemplate

CALLS = "{%- for c in m.tool_calls or [] %}"
TURN = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ (m.content or '') }}"
END = "{%- endfor %}{{ '<|im_end|>' }}{%- endfor %}"

TEMPLATES = {
    "hermes": QWEN3,
    "deepseek_v3": (
        TURN + "{{- '<｜tool▁calls▁begin｜>' if m.tool_calls }}" + CALLS + "{{- '\\n' if not loop.first }}"
        "{{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + c.function.name + '\\n```json\\n' }}"
        "{{- c.function.arguments | tojson }}{{ '\\n```<｜tool▁call▁end｜>' }}"
        "{{- '<｜tool▁calls▁end｜>' if loop.last }}" + END
    ),
    "deepseek_v31": (
        TURN + "{{- '<｜tool▁calls▁begin｜>' if m.tool_calls }}" + CALLS + "{{- '<｜tool▁call▁begin｜>' }}"
        "{{- c.function.name + '<｜tool▁sep｜>' + c.function.arguments + '<｜tool▁call▁end｜>' }}"
        "{{- '<｜tool▁calls▁end｜>' if loop.last }}" + END
    ),
    "kimi_k2": (
        TURN + "{{- '<|tool_calls_section_begin|>' if m.tool_calls }}" + CALLS + "{{- '<|tool_call_begin|>' + c.id }}"
        "{{- '<|tool_call_argument_begin|>' }}{{ c.function.arguments | tojson }}{{ '<|tool_call_end|>' }}"
        "{{- '<|tool_calls_section_end|>' if loop.last }}" + END
    ),
    "glm45": (
        TURN + CALLS + "{{- '\\n<tool_call>' + c.function.name + '\\n' }}"
        "{%- for name, value in c.function.arguments | items %}{{ '<arg_key>' + name + '</arg_key>\\n<arg_value>' }}"
        "{{- value if value is string else value | tojson }}{{ '</arg_value>\\n' }}{% endfor %}"
        "{{- '</tool_call>' }}" + END
    ),
    "mistral": (
        TURN + CALLS + "{{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' }}{{ c.function.arguments | tojson }}" + END
    ),
    "qwen3_coder": (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{{ (m.content or '') }}" + CALLS + "{{- '\\n' }}"
        "{{- '<tool_call>\\n<function=' + c.function.name + '>\\n' }}"
        "{%- for name, value in c.function.arguments | items %}{{ '<parameter=' + name + '>\\n' }}"
        "{{- value if value is string else value | tojson }}{{ '\\n</parameter>\\n' }}{% endfor %}"
        "{{- '</function>\\n</tool_call>' }}" + END
    ),
}
ARGUMENTS = {
    "city": st.text(st.characters(exclude_categories=["Cs"])),
    "days": st.integers(),
    "exact": st.booleans(),
    "options": st.dictionaries(st.text("ab\n\"'", max_size=3), st.none() | st.lists(st.text("ab</>\n")), max_size=2),
}
WORDS = st.text("ab <>/{}[]|\n\"'é") | st.just("")


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=WORDS.filter(lambda text: not text or not text.isspace()),
    reasoning=WORDS.filter(lambda text: not text or bool(text.strip("\n"))),
    calls=st.lists(st.tuples(st.sampled_from(["get_weather", "now"]), st.fixed_dictionaries({}, optional=ARGUMENTS))),
)
def test_an_answer_is_rendered_again_as_it_was_generated(
    name: str, content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]]
) -> None:
    template = ChatTemplate(TEMPLATES[name], special_tokens=TOKENS, name=name)
    thinks = name == "hermes"
    calls = [(tool, arguments if tool == "get_weather" else {}) for tool, arguments in calls]
    generated = turn(template, content, reasoning if thinks else "", calls)
    seen = read(parser(name, "qwen3" if thinks else None), [generated])
    again = [(tool, json.loads(arguments)) for tool, arguments in seen.calls]
    assert again == calls
    assert turn(template, seen.content, seen.reasoning, again) == generated


def turn(template: ChatTemplate, content: str, reasoning: str, calls: list[tuple[str, dict[str, Any]]]) -> str:
    """What the template makes of an assistant's message in the middle of a conversation."""
    message: dict[str, Any] = {"role": "assistant", "content": content, "reasoning_content": reasoning or None}
    if calls:
        message["tool_calls"] = [
            {"id": f"functions.{name}:{index}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(calls)
        ]
    chat = [{"role": "user", "content": "x"}, message, {"role": "tool", "content": "y", "tool_call_id": "z"}]
    text = joined(template.render(chat, add_generation_prompt=False))
    return text.split("<|im_start|>assistant\n", 1)[1].rsplit("<|im_end|>", 2)[0]


def test_nothing_said_and_nothing_called_is_nothing() -> None:
    assert read(parser("hermes", "qwen3"), [""]) == Seen()
