"""What models write, and what it is: one table for all formats.

A case is (name, parser, text, content, calls); a call is (name, arguments as JSON text). Arguments that are cut off or
no JSON are listed as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "exact": {"type": "boolean"},
            "near": {"type": ["string", "null"]},
            "options": {"anyOf": [{"type": "object"}, {"type": "array"}]},
            "unit": {"enum": ["C", "F"]},
            "limit": {"anyOf": [{"type": "number"}, {"type": "string"}]},
        },
    },
    "write_file": {"type": "object", "properties": {"path": {"type": "string"}, "content": {"type": "string"}}},
    "now": {"type": "object", "properties": {}},
}

Call = tuple[str, str]


class Case(NamedTuple):
    name: str
    parser: str
    text: str
    content: str
    calls: list[Call]


PARIS = '{"city": "Paris", "days": 3}'


def hermes(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


HERMES = [
    Case("one call", "hermes", hermes(f'{{"name": "f", "arguments": {PARIS}}}'), "", [("f", PARIS)]),
    Case(
        "content, two calls, a line end",
        "hermes",
        "Let me look.\n\n"
        + hermes(f'{{"name": "get_weather", "arguments": {PARIS}}}')
        + "\n"
        + hermes('{"name": "now", "arguments": {}}')
        + "\n",
        "Let me look.\n",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    Case("arguments first", "hermes", hermes(f'{{"arguments": {PARIS}, "name": "f"}}'), "", [("f", PARIS)]),
    Case("other keys", "hermes", hermes(f'{{"function": "f", "parameters": {PARIS}}}'), "", [("f", PARIS)]),
    Case(
        "OpenAI's shape",
        "hermes",
        hermes(f'{{"type": "function", "id": 5, "function": {{"name": "f", "arguments": {PARIS}}}}}'),
        "",
        [("f", PARIS)],
    ),
    Case("OpenAI's shape, not closed", "hermes", '<tool_call>{"function": {"name": "f"}}', "", [("f", "{}")]),
    Case(
        "arguments twice",
        "hermes",
        hermes(f'{{"name": "f", "arguments": {PARIS}, "parameters": {{"b": 2}}}}'),
        "",
        [("f", PARIS)],
    ),
    Case("no arguments", "hermes", hermes('{"name": "now"}'), "", [("now", "{}")]),
    Case("null for none", "hermes", hermes('{"name": "now", "arguments": null}'), "", [("now", "{}")]),
    Case(
        "arguments in a string",
        "hermes",
        hermes('{"name": "f", "arguments": "{\\"a\\": \\"\\\\n\\u00e9\\"}"}'),
        "",
        [("f", '{"a": "\\né"}')],
    ),
    Case("a bracket too many", "hermes", hermes(f'{{"name": "f", "arguments": {PARIS}}}}}'), "", [("f", PARIS)]),
    Case("a bracket too few", "hermes", hermes(f'{{"name": "f", "arguments": {PARIS}'), "", [("f", PARIS)]),
    Case("Python's words", "hermes", hermes("{'name': 'f', 'arguments': {'a': True,}}"), "", [("f", '{"a": true}')]),
    Case(
        "a raw line end in a string",
        "hermes",
        hermes('{"name": "f", "arguments": {"a": "x\n\ty"}}'),
        "",
        [("f", '{"a": "x\\n\\ty"}')],
    ),
    Case(
        "the closing tag in a string",
        "hermes",
        hermes('{"name": "f", "arguments": {"a": "</tool_call>{"}}') + "done",
        "done",
        [("f", '{"a": "</tool_call>{"}')],
    ),
    Case("no JSON", "hermes", hermes('{"name": "f", "arguments": {a: @!}}'), "", [("f", "{a: @!}}\n")]),
    Case("the tag in prose", "hermes", "Write <tool_call> and {\n", "Write <tool_call> and {\n", []),
    Case("no name", "hermes", hermes('{"arguments": {}}'), hermes('{"arguments": {}}'), []),
    Case("a list", "hermes", hermes("[1]"), hermes("[1]"), []),
    Case("a tag after a tag", "hermes", "<tool_call><tool_call>{'name': 'f'}", "<tool_call>", [("f", "{}")]),
    Case("cut off in the tag", "hermes", "So <tool_ca", "So <tool_ca", []),
    Case(
        "a bracket too few, and more",
        "hermes",
        hermes(f'{{"name": "f", "arguments": {PARIS}') + " then " + hermes('{"name": "g"}'),
        "then ",
        [("f", PARIS), ("g", "{}")],
    ),
    Case(
        "no JSON, and more",
        "hermes",
        hermes('{"name": "f", "arguments": {a: @!}}') + '"b": {}}',
        '"b": {}}',
        [("f", "{a: @!}}\n")],
    ),
    Case("cut off behind the name", "hermes", '<tool_call>{"name": "f"', "", [("f", "")]),
    Case("cut off in a string of JSON", "hermes", '<tool_call>{"name":"f","arguments":"{', "", [("f", '"{')]),
    Case("cut off in the name", "hermes", '<tool_call>\n{"name": "ge', '<tool_call>\n{"name": "ge', []),
    Case("cut off in a string", "hermes", '<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    Case("cut off in an escape", "hermes", '<tool_call>{"name":"f","arguments":{"a":"b\\', "", [("f", '{"a":"b')]),
    Case("cut off behind the call", "hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
    Case("white space before", "hermes", "\n\n  " + hermes('{"name": "f"}'), "", [("f", "{}")]),
    Case("white space only", "hermes", " \n", " \n", []),
    Case("nothing", "hermes", "", "", []),
    Case(
        "other scripts",
        "hermes",
        "日本 👋" + hermes('{"name": "天気", "arguments": {"a": "👋"}}'),
        "日本 👋",
        [("天気", '{"a": "👋"}')],
    ),
]


def qwen(function: str, **parameters: str) -> str:
    inner = "".join(f"<parameter={name}>\n{value}\n</parameter>\n" for name, value in parameters.items())
    return f"<tool_call>\n<function={function}>\n{inner}</function>\n</tool_call>"


def xml(name: str, text: str, calls: list[Call], content: str = "") -> Case:
    return Case(name, "qwen3_coder", text, content, calls)


QWEN3_CODER = [
    xml(
        "types of the schema",
        "On it.\n" + qwen("get_weather", city="3", days="3", exact="True", near="null", options='{"a": [1]}', unit="C"),
        [
            (
                "get_weather",
                '{"city": "3", "days": 3, "exact": true, "near": null, "options": {"a": [1]}, "unit": "C"}',
            )
        ],
        "On it.",
    ),
    xml("a number or text", qwen("get_weather", limit="2.5"), [("get_weather", '{"limit": 2.5}')]),
    xml("a number or text 2", qwen("get_weather", limit="many"), [("get_weather", '{"limit": "many"}')]),
    xml("what is not of its type", qwen("get_weather", days="few"), [("get_weather", '{"days": "few"}')]),
    xml("Python's literal", qwen("get_weather", options="{'a': (1,)}"), [("get_weather", '{"options": {"a": [1]}}')]),
    xml("an unknown tool", qwen("f", a="1"), [("f", '{"a": "1"}')]),
    xml("no parameters", qwen("now"), [("now", "{}")]),
    xml("two calls", qwen("now") + "\n" + qwen("now"), [("now", "{}"), ("now", "{}")]),
    xml(
        "lines, quotes and tags in a value",
        qwen("write_file", path="a", content='\n<b x="1">\\n</b>\n\n'),
        [("write_file", '{"path": "a", "content": "\\n<b x=\\"1\\">\\\\n</b>\\n\\n"}')],
    ),
    xml(
        "its own tags in a value",
        qwen("write_file", path="a", content="<x>\n</parameter>\n<function=f>\n</function>\n</tool_call>"),
        [
            (
                "write_file",
                '{"path": "a", "content": "<x>\\n</parameter>\\n<function=f>\\n</function>\\n</tool_call>"}',
            )
        ],
    ),
    xml(
        "</parameter> forgotten before the next one",
        "<tool_call><function=write_file><parameter=path>\na\n<parameter=content>\nb\n</parameter></function></tool_call>",
        [("write_file", '{"path": "a", "content": "b"}')],
    ),
    xml(
        "</parameter> forgotten before the end",
        "<tool_call>\n<function=write_file>\n<parameter=path>\na\n</function>\n</tool_call>\n",
        [("write_file", '{"path": "a"}')],
    ),
    xml(
        "<tool_call> forgotten",
        "So\n<function=now>\n</function>\n</tool_call>",
        [("now", "{}")],
        "So",
    ),
    xml("a function that is none of the tools", "<function=f>", [], "<function=f>"),
    xml("the tag in prose", "<tool_call> is a tag", [], "<tool_call> is a tag"),
    xml("content behind", qwen("now") + "\nDone.", [("now", "{}")], "Done."),
    xml(
        "cut off in a value",
        "<tool_call>\n<function=write_file>\n<parameter=path>\na/b",
        [("write_file", '{"path": "a/b')],
    ),
    xml(
        "cut off in a number",
        "<tool_call>\n<function=get_weather>\n<parameter=days>\n1",
        [("get_weather", '{"days": 1')],
    ),
    xml("cut off in the function", "<tool_call>\n<function=no", [], "<tool_call>\n<function=no"),
    xml("cut off behind it", "<tool_call>\n<function=now>\n", [("now", "{")]),
]


def deepseek(*calls: str) -> str:
    inner = "\n".join(f"<｜tool▁call▁begin｜>{call}<｜tool▁call▁end｜>" for call in calls)
    return f"<｜tool▁calls▁begin｜>{inner}<｜tool▁calls▁end｜>"


def fenced(name: str, arguments: str) -> str:
    return f"function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```"


DEEPSEEK = [
    Case(
        "two calls",
        "deepseek_v3",
        "Well.\n" + deepseek(fenced("get_weather", PARIS), fenced("now", "{}")),
        "Well.\n",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    Case("no fence", "deepseek_v3", deepseek("function<｜tool▁sep｜>now\n{}"), "", [("now", "{}")]),
    Case(
        "two calls",
        "deepseek_v31",
        deepseek(f"get_weather<｜tool▁sep｜>{PARIS}", "now<｜tool▁sep｜>{}"),
        "",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    Case("no arguments", "deepseek_v31", deepseek("now<｜tool▁sep｜>"), "", [("now", "{}")]),
    Case(
        "no JSON",
        "deepseek_v31",
        deepseek("f<｜tool▁sep｜>{a=1}", "now<｜tool▁sep｜>{}"),
        "",
        [("f", "{a=1}"), ("now", "{}")],
    ),
    Case("no header", "deepseek_v31", deepseek("what is this?", ""), "what is this?", []),
    Case("cut off", "deepseek_v31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{", "", [("f", "{")]),
    Case("a long header", "deepseek_v31", "<｜tool▁call▁begin｜>" + "x" * 500 + "{", "x" * 500 + "{", []),
]


def kimi(*calls: str) -> str:
    inner = "".join(f"<|tool_call_begin|>{call}<|tool_call_end|>" for call in calls)
    return f"<|tool_calls_section_begin|>{inner}<|tool_calls_section_end|>"


KIMI_K2 = [
    Case(
        "two calls",
        "kimi_k2",
        "Hm."
        + kimi(
            f"functions.get_weather:0<|tool_call_argument_begin|>{PARIS}",
            "functions.now:1<|tool_call_argument_begin|>{}",
        ),
        "Hm.",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    Case("no prefix", "kimi_k2", kimi("now:3 <|tool_call_argument_begin|> {}"), "", [("now", "{}")]),
    Case("dots", "kimi_k2", kimi("functions.a.b:0<|tool_call_argument_begin|>{}"), "", [("a.b", "{}")]),
    Case(
        "the other spelling",
        "kimi_k2",
        "<|tool_call_section_begin|><|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
        "<|tool_call_section_end|>",
        "",
        [("now", "{}")],
    ),
    Case(
        "no section",
        "kimi_k2",
        "<|tool_call_begin|>now<|tool_call_argument_begin|>{}<|tool_call_end|>",
        "",
        [("now", "{}")],
    ),
    Case("tokens astray", "kimi_k2", "a<|tool_call_end|>b<|tool_call_argument_begin|>c", "abc", []),
    Case(
        "cut off",
        "kimi_k2",
        '<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{"a": tru',
        "",
        [("now", '{"a": tru')],
    ),
]


LLAMA3 = [
    Case("one call", "llama3_json", f'{{"name": "get_weather", "parameters": {PARIS}}}', "", [("get_weather", PARIS)]),
    Case(
        "two calls behind the token",
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "now", "parameters": {}}; {"name": "now", "parameters": {"a": 1}}',
        "",
        [("now", "{}"), ("now", '{"a": 1}')],
    ),
    Case("below content", "llama3_json", 'So:\n{"name": "now", "parameters": {}}', "So:", [("now", "{}")]),
    Case("JSON that is none", "llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    Case("JSON in prose", "llama3_json", 'a {"name": "now"}\n{"b": 1}', 'a {"name": "now"}\n{"b": 1}', []),
    Case("space behind the token", "llama3_json", '<|python_tag|> {"name": "now"}', "", [("now", "{}")]),
    Case("cut off behind the name", "llama3_json", '{"name": "now"', "", [("now", "")]),
    Case("broken off", "llama3_json", '{"name": "now" what', "what", [("now", "{}")]),
    Case("code", "llama3_json", "if x:\n{ y }\n", "if x:\n{ y }\n", []),
    Case("cut off", "llama3_json", '{"name": "now", "parameters": {"a', "", [("now", '{"a')]),
    Case("cut off before it is one", "llama3_json", '\n{"name": "no', '\n{"name": "no', []),
]

PYTHONIC = [
    Case(
        "two calls",
        "pythonic",
        "[get_weather(city='Paris', days=3), now()]",
        "",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    Case(
        "literals",
        "pythonic",
        '[now(a=[1, -2.5e3, None], b={"c": (True, False,)}, d="it\'s \\x41\\d", e=\'"q"\', f="""x\n"y" """)]',
        "",
        [
            (
                "now",
                '{"a": [1, -2.5e3, null], "b": {"c": [true, false]}, "d": "it\'s A\\\\d", "e": "\\"q\\"", '
                '"f": "x\\n\\"y\\" "}',
            )
        ],
    ),
    Case("space", "pythonic", "[ now ( ) , now( a = 1 , ) ]", "", [("now", "{}"), ("now", '{"a": 1}')]),
    Case("tokens", "pythonic", "<|python_start|>[now()]<|python_end|>", "", [("now", "{}")]),
    Case("below content", "pythonic", "So:\n[now( a = 1, )]", "So:", [("now", '{"a": 1}')]),
    Case("a list", "pythonic", "[1, 2]\n[x for x in y]", "[1, 2]\n[x for x in y]", []),
    Case("a function that is none of the tools", "pythonic", "[f(a=1)]", "[f(a=1)]", []),
    Case("no keyword", "pythonic", "[now(1)] oh", "1)] oh", [("now", "{")]),
    Case("only half a list", "pythonic", "[now(), what", " what", [("now", "{}")]),
    Case("cut off", "pythonic", "[now(a='b", "", [("now", '{"a": "b')]),
]

def glm(function: str, line: str = "\n", **arguments: str) -> str:
    inner = "".join(
        f"<arg_key>{name}</arg_key>{line}<arg_value>{value}</arg_value>{line}" for name, value in arguments.items()
    )
    return f"<tool_call>{function}{line}{inner}</tool_call>"


def tagged(name: str, text: str, calls: list[Call], content: str = "") -> Case:
    return Case(name, "glm45", text, content, calls)


GLM45 = [
    tagged("one call", glm("get_weather", city="Paris", days="3"), [("get_weather", PARIS)]),
    tagged("no line ends", glm("get_weather", "", city="Paris", days="3"), [("get_weather", PARIS)]),
    tagged(
        "types of the schema",
        "On it.\n" + glm("get_weather", city="3", exact="true", near="null", options='{"a": [1]}', unit="C"),
        [("get_weather", '{"city": "3", "exact": true, "near": null, "options": {"a": [1]}, "unit": "C"}')],
        "On it.",
    ),
    tagged("a number or text", glm("get_weather", limit="2.5"), [("get_weather", '{"limit": 2.5}')]),
    tagged("an unknown tool", glm("f", a="1"), [("f", '{"a": "1"}')]),
    tagged("no arguments", glm("now"), [("now", "{}")]),
    tagged("no arguments, no line end", "<tool_call>now</tool_call>", [("now", "{}")]),
    tagged("two calls", glm("now") + "\n" + glm("now") + "\n", [("now", "{}"), ("now", "{}")]),
    tagged(
        "lines, quotes and tags in a value",
        glm("write_file", path="a", content='\n<b x="1">\\n</b>\n\n'),
        [("write_file", '{"path": "a", "content": "\\n<b x=\\"1\\">\\\\n</b>\\n\\n"}')],
    ),
    tagged(
        "its own tags in a value",
        glm("write_file", path="a", content="<x></arg_value> and </tool_call> then <arg_key>"),
        [("write_file", '{"path": "a", "content": "<x></arg_value> and </tool_call> then <arg_key>"}')],
    ),
    tagged(
        "</arg_value> forgotten before the end",
        "<tool_call>write_file\n<arg_key>path</arg_key>\n<arg_value>a</tool_call>\n" + glm("now"),
        [("write_file", '{"path": "a"}'), ("now", "{}")],
    ),
    tagged("<arg_value> forgotten", "<tool_call>now<arg_key>a</arg_key>b", [("now", "{}")], "b"),
    tagged("content behind", glm("now") + "\nDone.", [("now", "{}")], "Done."),
    tagged("the tag in prose", "<tool_call> is a tag", [], "<tool_call> is a tag"),
    tagged("another format", hermes('{"name": "f"}'), [], hermes('{"name": "f"}')),
    tagged("cut off in a value", glm("write_file", path="a/b")[:-25], [("write_file", '{"path": "a/b')]),
    tagged(
        "cut off in a number",
        "<tool_call>get_weather<arg_key>days</arg_key><arg_value>1",
        [("get_weather", '{"days": 1')],
    ),
    tagged("cut off in the name", "<tool_call>no", [], "<tool_call>no"),
    tagged("cut off behind a value", glm("write_file", path="a")[:-12], [("write_file", '{"path": "a"')]),
]


def mistral(*calls: str) -> str:
    return "".join(f"[TOOL_CALLS]{call}" for call in calls)


MISTRAL = [
    Case("one call", "mistral", mistral(f"get_weather[ARGS]{PARIS}"), "", [("get_weather", PARIS)]),
    Case(
        "content and two calls",
        "mistral",
        "Let me look." + mistral(f"get_weather[ARGS]{PARIS}", "now[ARGS]{}"),
        "Let me look.",
        [("get_weather", PARIS), ("now", "{}")],
    ),
    Case("an id", "mistral", mistral("now[CALL_ID]abcDEF123[ARGS]{}"), "", [("now", "{}")]),
    Case(
        "without the token",
        "mistral",
        mistral('now{"a": [1]}', "now {}"),
        "",
        [("now", '{"a": [1]}'), ("now", "{}")],
    ),
    Case("a name and nothing", "mistral", mistral("now[ARGS]", "f[ARGS]{}"), "", [("now", "{}"), ("f", "{}")]),
    Case("no JSON", "mistral", mistral("f[ARGS]{a=1}", "now[ARGS]{}"), "", [("f", "{a=1}"), ("now", "{}")]),
    Case("content behind", "mistral", mistral("now[ARGS]{}") + " Done.", "Done.", [("now", "{}")]),
    Case("the token in prose", "mistral", "A [TOOL_CALLS] token", "A [TOOL_CALLS] token", []),
    Case("cut off in the name", "mistral", "[TOOL_CALLS]no", "[TOOL_CALLS]no", []),
    Case("cut off", "mistral", '[TOOL_CALLS]now[ARGS]{"a": "b', "", [("now", '{"a": "b')]),
    Case("one call", "mistral_v3", f'[TOOL_CALLS] [{{"name": "f", "arguments": {PARIS}}}]', "", [("f", PARIS)]),
    Case(
        "two calls with ids",
        "mistral_v3",
        f'So.[TOOL_CALLS][{{"name": "f", "arguments": {PARIS}, "id": "abcDEF123"}}, '
        '{"arguments": {}, "name": "now"}]',
        "So.",
        [("f", PARIS), ("now", "{}")],
    ),
    Case("a bracket too few", "mistral_v3", '[TOOL_CALLS] [{"name": "now"} what', "what", [("now", "{}")]),
    Case("a list of something else", "mistral_v3", "[TOOL_CALLS] [1, 2]", "[TOOL_CALLS] [1, 2]", []),
    Case("more of something else", "mistral_v3", '[TOOL_CALLS] [{"name": "now"}, 2]', "2]", [("now", "{}")]),
    Case("cut off", "mistral_v3", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    Case("cut off behind a call", "mistral_v3", '[TOOL_CALLS] [{"name": "now"},', "", [("now", "{}")]),
]

ALL = [*HERMES, *QWEN3_CODER, *DEEPSEEK, *KIMI_K2, *LLAMA3, *PYTHONIC, *GLM45, *MISTRAL]
