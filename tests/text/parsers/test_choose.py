"""The parser that belongs to a template."""

from __future__ import annotations

import pytest

from tests.text.templates import LLAMA3, MISTRAL, QWEN3
from tokenspeed.text.parsers.choose import AnswerFormat
from tokenspeed.text.template import ChatTemplate

TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"
THINKS = "{% set content = content.split('</think>')[-1] %}"

FAMILIES = {
    "Qwen 3": (QWEN3, "hermes", "qwen3"),
    "Qwen 2.5": (TOOLS + '<tool_call>{"name": <function-name>, "arguments": <args-json-object>}', "hermes", None),
    "Qwen 3 Coder": (TOOLS + "<tool_call>\n<function=example><parameter=a>", "qwen3_coder", None),
    "Llama 3.1": (LLAMA3, "llama3_json", None),
    "Llama 3.2 pythonic": (TOOLS + "[func_name1(params_name1=params_value1)]", "pythonic", None),
    "DeepSeek R1": (
        TOOLS + THINKS + "<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + '\\n```json'",
        "deepseek_v3",
        "deepseek_r1",
    ),
    "DeepSeek V3.1": (
        "{{ m.tool_calls }}{% if thinking %}<｜Assistant｜></think>{% endif %}<｜tool▁calls▁begin｜>",
        "deepseek_v31",
        "deepseek_v3",
    ),
    "Kimi K2": (TOOLS + "<|tool_calls_section_begin|><|tool_call_begin|>", "kimi_k2", None),
    "Kimi K2 Thinking": (TOOLS + "<|tool_call_begin|><think></think>", "kimi_k2", "kimi_k2"),
    "GLM 4.5": (TOOLS + "<tool_call>name<arg_key></think> arguments", "glm45", "glm45"),
    "Mistral": (MISTRAL, "mistral_v3", None),
    "Magistral": (TOOLS + "[THINK][/THINK][TOOL_CALLS]' + name + '[ARGS]", "mistral", "mistral"),
    "no tools": ("{% for message in messages %}{{ message.content }}{% endfor %}", None, None),
}


def format_of(template: str, *flags: str) -> AnswerFormat:
    return AnswerFormat.of([template], ChatTemplate(template, name="it").knows_tools, *flags)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_recognised_by_its_template(family: str) -> None:
    template, tools, reasoning = FAMILIES[family]
    found = format_of(template)
    assert (found.tools, found.reasoning) == (tools, reasoning)
    assert bool(found.no_tools) is (tools is None)


SILENT = TOOLS + "{{ message.content }}"


@pytest.mark.parametrize(
    ("template", "model_type", "tools", "reasoning"),
    [
        (SILENT, "qwen3_moe", "hermes", "qwen3"),
        (SILENT, "kimi_k2", "kimi_k2", "kimi_k2"),
        (SILENT, "deepseek_v3", "deepseek_v3", None),
        (SILENT, "llama", None, None),
        (SILENT, "", None, None),
        (FAMILIES["Qwen 3 Coder"][0], "qwen3_moe", "qwen3_coder", "qwen3"),
        (SILENT, "glm4_moe", "glm45", "glm45"),
        (FAMILIES["GLM 4.5"][0], "qwen3", "glm45", "glm45"),
    ],
)
def test_the_architecture_decides_what_the_template_leaves_open(
    template: str, model_type: str, tools: str | None, reasoning: str | None
) -> None:
    found = AnswerFormat.of([template], True, model_type=model_type)
    assert (found.tools, found.reasoning) == (tools, reasoning)
    off = AnswerFormat.of([template], True, "none", "none", model_type)
    assert (off.tools, off.reasoning) == (None, None)


def test_a_flag_overrules_what_was_recognised() -> None:
    found = format_of(QWEN3, "pythonic", "kimi_k2")
    assert (found.tools, found.reasoning, found.no_tools) == ("pythonic", "kimi_k2", "")
    assert found.summary == "reasoning parser: kimi_k2; tool-call parser: pythonic"
    off = format_of(QWEN3, "none", "none")
    assert (off.tools, off.reasoning) == (None, None)
    assert off.summary == f"reasoning parser: none; tool-call parser: none, {off.no_tools}"
    assert "--tool-call-parser none" in off.no_tools
    assert AnswerFormat.of([], False, "hermes").no_tools
    assert format_of(FAMILIES["no tools"][0], "hermes").no_tools


@pytest.mark.parametrize(
    ("template", "knows"),
    [
        ("{%- if tools is not none %}{{ tools | tojson }}{% endif %}", True),
        ("{%- if not tools is defined %}{% set tools = [] %}{% endif %}{% for t in tools %}{{ t }}{% endfor %}", True),
        ("{# tools #}You have no tools. {% if message.tool_calls %}{{ 'the tools' }}{% endif %}", False),
        ("{% set tools = 5 %}", False),
    ],
)
def test_only_a_template_that_reads_the_tools_knows_them(template: str, knows: bool) -> None:
    assert ChatTemplate(template, name="it").knows_tools is knows


def test_only_markers_of_what_is_read_are_shown() -> None:
    found = AnswerFormat("kimi_k2", "qwen3")
    assert found.markers(with_tools=False) == {"<think>", "</think>"}
    assert "<|tool_call_begin|>" in found.markers(with_tools=True)
    assert AnswerFormat(None, None).markers(with_tools=True) == frozenset()
    assert AnswerFormat(None, None).parser({}, "") is None
    assert AnswerFormat("hermes", None).parser(None, "") is None
