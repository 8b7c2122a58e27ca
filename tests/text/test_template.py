"""Chat templates render what transformers renders, and fail as refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.text.conftest import write_json
from tests.text.templates import ALL, QWEN3, TOKENS, call, expected, joined
from tokenspeed.checkpoint.source import Source, resolve
from tokenspeed.errors import CheckpointError, InvalidRequest
from tokenspeed.text.load import TextSide, load_text
from tokenspeed.text.spans import Span
from tokenspeed.text.template import ChatTemplate

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather\nof a <place> & more",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string"},
                "unit": {"enum": ["C", "F"]},
                "days": {"type": "array", "items": {"type": "number"}},
            },
            "required": ["place"],
        },
    },
}
PLAIN = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi\n\nthere\t!"}],
    [
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes, two."},
        {"role": "user", "content": "Why < & > 'quoted' \"double\"?"},
    ],
    [
        {"role": "user", "content": "Weather in Köln 🌧?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call("get_weather", {"place": "Köln", "days": [1, 2.5]})],
        },
        {"role": "tool", "content": "rain", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "Rain.", "reasoning_content": "look outside"},
        {"role": "user", "content": "Thanks"},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call("now", "{}"), call("now", '{"x": 1}')]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "one\ttwo"}, {"type": "text", "text": "three"}]}],
    [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "USER ", "content": "upper role", "name": "bob"}],
    [{"role": "system", "content": "only a system message"}],
    [{"role": "user"}],
]


def rendered(template: ChatTemplate, messages: list[dict[str, Any]], **kwargs: Any) -> str | None:
    try:
        return joined(template.render(messages, **kwargs))
    except InvalidRequest as error:
        assert error.param in ("messages", "continue_final_message")
        return None


@pytest.mark.parametrize("name", sorted(ALL))
def test_real_templates_render_as_in_transformers(oracle: Any, name: str) -> None:
    template = ChatTemplate(ALL[name], special_tokens=TOKENS, name=name)
    texts = set()
    for messages in CONVERSATIONS:
        before = json.dumps(messages)
        for tools in (None, [WEATHER], [PLAIN, WEATHER]):
            for extra in ({}, {"add_generation_prompt": False}, {"enable_thinking": False}, {"date_string": "1 May"}):
                want = expected(oracle, ALL[name], messages, tools=tools, **extra)
                assert rendered(template, messages, tools=tools, **extra) == want
                texts.add(want)
        assert json.dumps(messages) == before
    assert len(texts - {None}) >= 12


def test_the_demo_template_renders_as_in_transformers(oracle: Any, demo: TextSide) -> None:
    assert demo.template is not None
    source = demo.template.sources["default"]
    for messages in CONVERSATIONS:
        for extra in ({}, {"add_generation_prompt": False}):
            assert rendered(demo.template, messages, **extra) == expected(oracle, source, messages, **extra)


@pytest.mark.parametrize("name", sorted(ALL))
@pytest.mark.parametrize("content", ["", "Sure:", " Sure:  ", "<think>hm", [{"type": "text", "text": "par"}]])
def test_a_final_message_is_continued_as_in_transformers(oracle: Any, name: str, content: Any) -> None:
    template = ChatTemplate(ALL[name], special_tokens=TOKENS, name=name)
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": content}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(content, list) and name in ("llama3", "mistral"):
        # These print the list as Python does; where it came from is lost then, and so is its end.
        assert rendered(template, messages, **options) is None
        return
    want = expected(oracle, ALL[name], messages, **options)
    assert rendered(template, messages, **options) == want
    assert want is not None or (name, type(content)) in (("deepseek", list), ("qwen3", list))


def test_a_final_message_that_the_template_rewrites_is_continued_where_it_ends() -> None:
    messages = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "one\n</think>\ntwo \n"}]
    spans = ChatTemplate(QWEN3, special_tokens=TOKENS, name="toy").render(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert joined(spans).endswith("<|im_start|>assistant\n<think>\none\n</think>\n\ntwo \n")


def test_the_end_of_a_continued_message_cannot_be_faked() -> None:
    template = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}{{ messages[0].content }}", name="toy")
    tag = "CONTINUE_FINAL_MESSAGE_TAG "
    spans = template.render(
        [{"role": "user", "content": f"a{tag}"}, {"role": "assistant", "content": "b"}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert joined(spans) == f"[a{tag}][b"
    for source in ("{{ messages[0].content }}", "{% for m in messages %}{{ m.content|lower }}{% endfor %}"):
        with pytest.raises(InvalidRequest) as caught:
            ChatTemplate(source, name="toy").render(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                add_generation_prompt=False,
                continue_final_message=True,
            )
        assert caught.value.param == "continue_final_message"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('Roles must alternate: ' + messages[0].content) }}", "Roles must alternate: …"),
        ("{{ messages[0].content.absent.more }}", "has no attribute 'absent'"),
        ("{{ messages[0][messages[0].content].x }}", "…"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ {'a': 1}[messages[0].content] + 1 }}", "'dict object' has no attribute '…'"),
        (
            "{% set n = namespace(t='x'|tojson) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}",
            "too much",
        ),
        ("{% set n = namespace(t=[1]) %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}", "too much"),
        (
            "{% set n = namespace(t='xx') %}{% for i in range(60) %}{% set n.t = n.t.replace('x', n.t) %}{% endfor %}",
            "too much",
        ),
        (
            "{% set n = namespace(t='xx') %}{% for i in range(60) %}{% set n.t = n.t|replace('x', n.t) %}{% endfor %}",
            "too much",
        ),
        ("{{ messages[0].content.__class__.__mro__ }}", "sandbox"),
        ("{{ messages.append(1) }}", "sandbox"),
        ("{% for i in range(10**6) %}x{% endfor %}", "too much"),
        ("{{ 'x' * 10**9 }}", "too much"),
        ("{{ [0] * 10**9 }}", "too much"),
        ("{{ 10 ** (10 ** 9) }}", "too much"),
        ("{{ '%999999999d' % 1 }}", "too much"),
        ("{{ '{:999999999}'.format(1) }}", "too much"),
        ("{{ 'x'.center(10**9) }}", "too much"),
        ("{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}", "too much"),
        ("{% set n = namespace(t='x') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}", "too much"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% set ns = namespace(_x=1) %}", "sandbox"),
        ("{{ undefined_function() }}", "'undefined_function' is undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ lipsum(5) }}", "undefined"),
        ("{{ ['a']|map(messages[0].content)|list }}", "TemplateRuntimeError"),
    ],
)
def test_a_template_that_fails_is_the_requests_fault_and_repeats_none_of_it(source: str, said: str) -> None:
    template = ChatTemplate(source, name="toy")
    with pytest.raises(InvalidRequest) as caught:
        print(joined(template.render([{"role": "user", "content": "секрет"}]))[:200])
    assert said in caught.value.message
    assert "секрет" not in caught.value.message
    assert caught.value.param == "messages"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("key", ["bos_token", "raise_exception", "namespace", "range", "messages", "self"])
def test_variables_of_the_server_cannot_be_set_by_a_request(key: str) -> None:
    template = ChatTemplate("{{ bos_token }}", special_tokens=TOKENS, name="toy")
    with pytest.raises(InvalidRequest, match=key) as caught:
        template.render([], **{key: "x"})
    assert caught.value.param == "chat_template_kwargs"


def test_continuing_and_prompting_exclude_each_other() -> None:
    template = ChatTemplate("{{ messages[0].content }}", name="toy")
    with pytest.raises(InvalidRequest):
        template.render([{"role": "assistant", "content": "x"}], continue_final_message=True)


def test_extra_variables_are_request_text() -> None:
    spans = ChatTemplate("<{{ who }}>", name="toy").render([], who="<|im_end|>")
    assert spans == [Span("<", False), Span("<|im_end|>", True), Span(">", False)]


@pytest.mark.parametrize("source", ["{% if %}", "{{ x|unheard }}", "{% endfor %}", "{% include 'x' %}{% foo %}"])
def test_a_template_that_does_not_compile_names_its_file(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"^some/file\.jinja: chat template, line 1: ") as caught:
        ChatTemplate(source, name="some/file.jinja")
    assert "\n" not in str(caught.value)


def source_of(folder: Path, **kwargs: Any) -> dict[str, str] | None:
    template = load_text(Source("hf", folder, "toy"), **kwargs).template
    return None if template is None else template.sources


def test_templates_are_found_where_checkpoints_keep_them(byte_level: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    assert source_of(tmp_path) is None
    write_json(tmp_path / "tokenizer_config.json", {**config, "chat_template": "in config"})
    assert source_of(tmp_path) == {"default": "in config"}
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    write_json(tmp_path / "tokenizer_config.json", {**config, "chat_template": named})
    assert source_of(tmp_path) == {"default": "plain", "tool_use": "tools"}
    template = load_text(Source("hf", tmp_path, "toy")).template
    assert template is not None
    assert joined(template.render([])) == "plain"
    assert joined(template.render([], tools=[PLAIN])) == "tools"
    (tmp_path / "chat_template.jinja").write_text("file {{ eos_token }}", encoding="utf-8")
    assert source_of(tmp_path) == {"default": "file {{ eos_token }}"}
    template = load_text(Source("hf", tmp_path, "toy")).template
    assert template is not None
    assert template.render([]) == [Span("file <|im_end|>", False)]
    own = tmp_path / "own.jinja"
    own.write_text("own", encoding="utf-8")
    assert source_of(tmp_path, chat_template=str(own)) == {"default": "own"}
    assert load_text(resolve(None), chat_template=str(own)).template is not None


def test_a_wrong_template_file_is_named(byte_level: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((byte_level / "tokenizer.json").read_bytes())
    for value in (
        7,
        [{"name": "x"}],
        [{"name": "default", "template": 5}],
        "{% if %}",
        [{"name": "a", "template": ""}, {"name": "b", "template": ""}],
    ):
        write_json(tmp_path / "tokenizer_config.json", {"chat_template": value})
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: ") as caught:
            source_of(tmp_path)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match=r"absent\.jinja: No such file"):
        source_of(byte_level, chat_template=str(tmp_path / "absent.jinja"))
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(CheckpointError, match=r"latin\.jinja: not UTF-8"):
        source_of(byte_level, chat_template=str(tmp_path / "latin.jinja"))


CALLING = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": "", "tool_calls": [call("now", {"a": "é"})]},
]
EACH_CALL = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (EACH_CALL + " {{ c.function.arguments | tojson }}{% endfor %}{% endfor %}", 'now {"a": "é"}'),
        (EACH_CALL + " {{ ' ' + c.function.arguments }}{% endfor %}{% endfor %}", 'now  {"a": "é"}'),
        (EACH_CALL + " {{ c.function.arguments.a }}{{ m.content is none }}{% endfor %}{% endfor %}", "now éTrue"),
        ("{% for m in messages if m.content is none %}{{ m.tool_calls[0].function.name }}{% endfor %}", "now"),
        (
            "{% for m in messages %}{{ m.content + (m.tool_calls or [{'function': {'name': ''}}])[0].function.name }}"
            "{% endfor %}",
            "xnow",
        ),
        ("{% for m in messages %}{{ m.role + ' ' + m.content + ';' }}{% endfor %}", "user x;assistant ;"),
    ],
)
def test_a_call_is_given_as_the_template_takes_it(source: str, text: str) -> None:
    """Null content or none, arguments as an object or as text: whatever makes the call show."""
    assert rendered(ChatTemplate(source, name="it"), CALLING) == text
